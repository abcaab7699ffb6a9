"""Calibration data in every form that people have them become the same token batches every time."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.loading import find_tokenizer
from ..validation import check_number
from . import chats
from .documents import IDS, find_column, read_documents
from .mixture import LEAST, SELF, Mixture, Source, counts, interleaved, names, sources_in
from .positions import LENGTH, check_length, default_length
from .reading import as_dataset, column_of_texts, load
from .sequences import packed_rows, random_windows

logger = logging.getLogger(__name__)

SEQUENCES = 128  # the papers' number


@overload
def calibration_batches(
    data: Sequence[Source],
    tokenizer: Any = ...,
    *,
    sequences: int | None = ...,
    length: int | None = ...,
    seed: int = ...,
    column: str | None = ...,
    split: str = ...,
    packing: str = ...,
    model: Any = ...,
) -> Tensor | Mixture: ...
@overload
def calibration_batches(
    data: Any,
    tokenizer: Any = ...,
    *,
    sequences: int | None = ...,
    length: int | None = ...,
    seed: int = ...,
    column: str | None = ...,
    split: str = ...,
    packing: str = ...,
    model: Any = ...,
) -> Tensor: ...
def calibration_batches(
    data: Any,
    tokenizer: Any = None,
    *,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    column: str | None = None,
    split: str = "train",
    packing: str = "full",
    model: Any = None,
) -> Tensor | Mixture:
    """Returns token ids `[sequences, length]`, int64; the same arguments give the same ids. Of several sources, a `Mixture`.

    In a mix each source gives its share of the sequences, the same that it would give alone, and any stretch of the mix
    holds all sources in their shares. A source that has too little text is an error.

    Args:
        data: texts, chats or token ids in any form:
            a list of texts, or of chats (lists of `{"role", "content", ...}` or ShareGPT's `{"from", "value"}`);
            a dataset of 🤗 Datasets, streaming too, a `DatasetDict`, a pandas or polars table, with a column of texts,
            messages, prompts with completions, or `input_ids` (whose `attention_mask` says what is padding);
            files or a list of files (text, jsonl, json, csv, tsv, parquet, also compressed), a pattern such as
            "shards/*.jsonl", a folder; a Hub dataset's name, "name:configuration" for one of several, `"c4"` and
            `"wikitext2"` for short, of which only what is needed is downloaded;
            token ids, a tensor `[n, t]` or lists; `"self"` for samples of the model (a file of that name is `"./self"`);
            a list of `Source`, or of dicts of their fields, for a mix.
        tokenizer: needed unless `data` are token ids; or a processor. Chats go through its chat template, with the
            `tools` of their row.
        sequences: how many; by default 128, or as many as the data give (then a warning says so).
        length: tokens in each; by default 2048 or the tokenizer's `model_max_length` if that is smaller.
        seed: of the order in which documents are drawn.
        column: of a dataset; by default the first of messages, conversations, text, content, input_ids.
        split: of a dataset that has several; "train+validation" joins two.
        packing: `"full"` joins documents, each closed by the end-of-text token, and cuts full sequences;
            `"documents"` is the papers' way: a random window of each drawn document that is longer than `length`.
        model: for `"self"`, see `self_samples`; its positions limit `length`.

    Raises:
        ValueError: nothing given, too little text for the sequences asked for, no tokenizer, no such column or split; data
            that cannot be read or reached; a chat that its template does not take, with the document's number; a bad
            `Source`; a model that cannot write samples, or whose positions are fewer than `length`.
    """
    for name, value, least in (("sequences", sequences, 1), ("length", length, 2)):
        if value is not None:
            check_number(name, value, f"[{least}, inf)", whole=True)
    if packing not in ("full", "documents"):
        raise ValueError(f"packing={packing!r}: use 'full' or 'documents'")
    if tokenizer is not None and not callable(tokenizer):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}; a loaded one is expected: AutoTokenizer.from_pretrained(...)"
        )
    if model is not None and length is not None:
        check_length(model, length)
    how = _Reading(tokenizer, seed, column, split, packing, model)
    mix = sources_in(data, column)
    if mix is not None and len(mix) == 1:
        data, how, mix = mix[0].data, how.of(mix[0]), None
    if isinstance(data, Tensor):
        return _from_tensor(data, sequences, length)
    if length is None:
        limit = getattr(tokenizer, "model_max_length", None) or LENGTH
        length = min(LENGTH, int(limit)) if model is None else default_length(model, tokenizer)
    wanted = sequences or SEQUENCES
    if mix is not None:
        return _mixture(mix, wanted, length, how)
    rows = _rows(data, wanted, length, how)
    if not len(rows):
        raise ValueError(
            f"the calibration data are empty or too short: they do not fill one sequence of {length} tokens; give more text, or a smaller length"
        )
    if len(rows) < wanted:
        message = f"the calibration data fill {len(rows)} of {wanted} sequences of {length} tokens"
        if sequences is not None:
            raise ValueError(f"{message}; give more text, a smaller length, or sequences={len(rows)}")
        logger.warning("%s; continuing with those", message)
    return rows


@dataclass(frozen=True)
class _Reading:
    """The options of `calibration_batches` that say how data become rows."""

    tokenizer: Any
    seed: int
    column: str | None
    split: str
    packing: str
    model: Any

    def of(self, source: Source) -> _Reading:
        """Returns these options with what the source says itself in their place."""
        return replace(self, column=source.column or self.column, split=source.split or self.split)


def _rows(data: Any, wanted: int, length: int, how: _Reading) -> Tensor:
    """Returns up to `wanted` sequences of one source, `[n, length]`."""
    if isinstance(data, Tensor):
        return _from_tensor(data, None, length)[:wanted]
    if isinstance(data, str) and data == SELF:
        from .self_sampling import self_samples

        return self_samples(how.model, how.tokenizer, sequences=wanted, length=length, seed=how.seed)
    rng = random.Random(how.seed)
    documents = read_documents(data, how.tokenizer, how.column, how.split, how.seed, rng)
    rows = (
        packed_rows(documents, how.tokenizer, wanted, length)
        if how.packing == "full"
        else random_windows(documents, wanted, length, rng)
    )
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)


def _mixture(mix: Sequence[Source], wanted: int, length: int, how: _Reading) -> Mixture:
    """Returns the sequences of all sources, each source's share, interleaved."""
    called, shares = names(mix), counts([source.weight for source in mix], wanted)
    total = math.fsum(source.weight for source in mix)
    weights = {name: source.weight / total for name, source in zip(called, mix, strict=True)}
    parts: list[Iterator[Tensor]] = []
    for source, name, count in zip(mix, called, shares, strict=True):
        try:
            rows = _rows(source.data, count, length, how.of(source))
        except ValueError as error:
            raise ValueError(f"source {name!r} of the calibration mix: {error}") from error
        if len(rows) < count:
            fitting = int(len(rows) / weights[name])
            smaller = f", or sequences={fitting}" if fitting >= LEAST * len(mix) else ""
            raise ValueError(
                f"source {name!r} of the calibration mix fills {len(rows)} of the {count} sequences of {length} tokens that its "
                f"weight makes of {wanted}; give it more text or a smaller weight, a smaller length{smaller}"
            )
        parts.append(iter(rows))
    order = interleaved(shares)
    return Mixture(torch.stack([next(parts[i]) for i in order]), tuple(called[i] for i in order), weights)


def read_texts(source: str, *, split: str = "test", column: str | None = None) -> list[str]:
    """Returns all documents of a local file, folder or Hub dataset, in order.

    Raises:
        ValueError: it cannot be read or reached, or holds chats or token ids.
    """
    data = load(source, split)
    if isinstance(data, list):
        return data
    name = find_column(data, column)
    if name is None or name in (*chats.COLUMNS, IDS):
        raise ValueError(f"{source} holds chats; perplexity is measured on texts: name a text column")
    return list(column_of_texts(data, name))


def _from_tensor(ids: Tensor, sequences: int | None, length: int | None) -> Tensor:
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be integers [sequences, tokens], not {ids.dtype} {list(ids.shape)}")
    if (length is not None and ids.shape[1] < length) or (sequences is not None and ids.shape[0] < sequences):
        raise ValueError(f"token ids {list(ids.shape)} are too few for sequences={sequences}, length={length}")
    return ids[:sequences, :length].to(torch.int64)


def model_batches(
    model: PreTrainedModel,
    data: Any,
    options: Mapping[str, Any],
    tokenizer: Any,
    source: Any,
    location: Mapping[str, Any],
) -> Any:
    """Returns what `prepare_batches` takes, from calibration data in any form.

    Batches of the model's own inputs become a list, since a plan and pruning both take them: those of a `DataLoader` (also one
    that accelerate prepared, or that shuffles), of a generator or list of dicts of tensors. A `Mixture` is left as it is. An encoder-decoder gets the rows of a tokenized dataset with labels one
    by one. All else goes through `calibration_batches`, at most as long as the model's positions.

    Args:
        options: further arguments of `calibration_batches`.
        tokenizer: by default the one beside the model, at `source` and `location`.
    """
    if isinstance(data, Mixture):
        return data
    if isinstance(data, torch.utils.data.DataLoader):
        return list(data)
    if isinstance(data, Tensor):
        return calibration_batches(data, model=model, **options)
    if isinstance(data, (list, tuple, Iterator)):
        first = next(iter(data), None)
        data = chain([] if first is None else [first], data) if isinstance(data, Iterator) else data
        if _is_batch(first):
            return list(data)
    if (rows := _labelled_rows(model, data, options)) is not None:
        return rows
    if tokenizer is None and ((isinstance(data, str) and data == SELF) or sources_in(data, options.get("column"))):
        tokenizer = find_tokenizer(source, **location)  # samples and ids do without
    elif tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **location)
    options = dict(options)
    if options.get("length") is None:
        options["length"] = default_length(model, tokenizer)
    return calibration_batches(data, tokenizer, model=model, **options)


def _is_batch(entry: Any) -> bool:
    """Returns whether an entry is a batch for the model: a dict with tensors, arrays or nested lists of ids."""
    if not isinstance(entry, Mapping):
        return False
    ids = entry.get(IDS)
    if isinstance(ids, (list, tuple)):
        return bool(ids) and isinstance(ids[0], (list, tuple))
    return any(hasattr(value, "shape") for value in entry.values())


def _labelled_rows(model: PreTrainedModel, data: Any, options: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the rows of a dataset that is made for an encoder-decoder, inputs with labels, as batches of one; else None."""
    if not getattr(model.config, "is_encoder_decoder", False) or not isinstance(data, (Mapping, Iterable)):
        return None
    data = data if isinstance(data, str) else as_dataset(data, options.get("split", "train"), (IDS, "labels"))
    columns = getattr(data, "column_names", None) or []
    inputs = [name for name in (model.main_input_name, "attention_mask", "labels") if name in columns]
    if not {model.main_input_name, "labels"} <= set(inputs):
        return None
    rows = data.shuffle(seed=options.get("seed", 0)).select_columns(inputs)
    count = options.get("sequences") or SEQUENCES
    return [
        {name: torch.as_tensor(value)[None] for name, value in row.items() if value is not None}
        for _, row in zip(range(count), rows, strict=False)
    ]
