"""Calibration text that the model writes itself.

Self-calibration: Williams, Chrysostomou and Aletras, https://arxiv.org/abs/2410.17170.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..distributed import Processes
from ..model.classes import text_config
from ..model.inference import evaluating
from ..model.offload import input_device, weight_store
from ..progress import Bar
from .sequences import packed_rows

TOGETHER = 8192  # tokens that are written at a time, whose keys and values are in memory
MOST_EMPTY = 256  # texts in a row that end at once; after these the model is taken to write none


def self_samples(model: PreTrainedModel, tokenizer: Any, *, sequences: int, length: int, seed: int = 0) -> Tensor:
    """Samples texts from the model at temperature 1, packs them as other documents, returns ids `[sequences, length]`, int64.

    Each begins after the beginning-of-text token, or lacking one the end-of-text token. The same seed gives the same ids
    on one machine; the global state of random numbers stays as it was.

    Raises:
        ValueError: no model; a model that cannot generate, is read from disk block by block, is an encoder-decoder, has
            no token to begin with, or ends every text at once.
    """
    _check(model)
    ends = _ends(model, tokenizer)
    start = _start(model, tokenizer, ends)
    most = max(1, length - 1)  # together with what it begins or ends with it fills one sequence
    config = GenerationConfig(
        do_sample=False,  # the draw is ours, see `_Draw`
        max_new_tokens=most,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else start,
    )
    bar = Bar("Sampling", sequences, "sequence", shown=Processes.current().main)
    with bar, evaluating(model), _generating(model, config), torch.no_grad():
        documents = _documents(model, start, set(ends), max(1, min(sequences, TOGETHER // length)), seed)
        rows = packed_rows(_counted(documents, bar, length, sequences), tokenizer, sequences, length)
    return torch.tensor(rows, dtype=torch.int64)


def _check(model: Any) -> None:
    if model is None:
        raise ValueError("calibration data 'self' are samples of the model: pass model=")
    if model.config.is_encoder_decoder:
        raise ValueError("calibration data 'self': an encoder-decoder writes nothing without being given a text")
    if weight_store(model) is not None:
        raise ValueError(
            "calibration data 'self': the model is streamed from disk and would be read anew for every token; leave it out, or "
            "give ids that calibration_batches('self', model=...) made where the model fits into memory"
        )
    if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        raise ValueError(f"calibration data 'self': {type(model).__name__} cannot generate text; load it with its head")


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Returns the tokens that end a text, the tokenizer's first."""
    tokens: list[int] = []
    for place in (tokenizer, model.generation_config, text_config(model.config)):
        ends = getattr(place, "eos_token_id", None)
        tokens += ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    return list(dict.fromkeys(map(int, tokens)))


def _start(model: PreTrainedModel, tokenizer: Any, ends: list[int]) -> int:
    places = (tokenizer, model.generation_config, text_config(model.config))
    begins = [getattr(place, "bos_token_id", None) for place in places]
    start = next((int(token) for token in [*begins, *ends[:1]] if token is not None), None)
    if start is None:
        raise ValueError("calibration data 'self': the model has no token that begins or ends a text to start from")
    return start


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own settings of generation (a temperature, penalties) inside."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _documents(model: PreTrainedModel, start: int, ends: set[int], together: int, seed: int) -> Iterator[list[int]]:
    """Yields one text after another, without the token that it began after, with the token that ended it."""
    begin = torch.full((together, 1), start, dtype=torch.int64, device=input_device(model))
    draw = LogitsProcessorList([_Draw(seed)])
    empty = 0  # texts, one after the other
    while empty < MOST_EMPTY:
        written = model.generate(  # type: ignore[operator]
            begin,
            attention_mask=torch.ones_like(begin),
            generation_config=model.generation_config,
            logits_processor=draw,
        )
        for row in written[:, 1:].tolist():
            text = _until(row, ends)
            empty = empty + 1 if text[0] in ends else 0
            if not empty:
                yield text
    raise ValueError(
        f"calibration data 'self': the model ended {empty} texts before they began; it is no source of text"
    )


class _Draw(LogitsProcessor):
    """Turns the search for the likeliest token into a draw at temperature 1, from a generator of its own.

    The largest of logits plus Gumbel noise is distributed as their softmax: Maddison, Tarlow and Minka, NeurIPS 2014,
    https://arxiv.org/abs/1411.0030. So the global random state is not touched, and the noise is the same on all devices.
    """

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores`: logits `[texts, vocabulary]`."""
        waiting = torch.empty(scores.shape).exponential_(generator=self._generator)
        return scores - waiting.log().to(scores.device)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Returns the tokens up to and with the first that ends a text; what follows is padding."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _counted(documents: Iterator[list[int]], bar: Bar, length: int, sequences: int) -> Iterator[list[int]]:
    tokens = 0
    for document in documents:
        yield document
        tokens += len(document) + 1
        while bar.count < min(tokens // length, sequences):
            bar.step()
