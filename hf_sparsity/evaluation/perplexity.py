"""Perplexity of a model on windows of text, and its divergence from the dense model there.

The protocol, which every command, card and table of this package means by "perplexity" (`PROTOCOL` says it in one
sentence): the documents of a text are joined and tokenized once, without special tokens (with the tokenizer's own for
the papers' three texts, see `texts.py`); the ids are cut into windows of one length that do not overlap, and what is
left at the end is dropped; each window is run by itself, without a token before it, and predicts all its tokens but
the first; perplexity is exp of the mean loss over all predictions. The dense model is scored on the same windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.batches import prepare_batches
from ..model.accepted import check_kind
from ..model.classes import require_next_token, text_config
from ..model.inference import Batch, evaluating
from ..model.precision import computing_as
from ..progress import follow
from .token_scores import token_scores

Array = np.ndarray[Any, Any]

LOGITS = 2**25  # numbers in one batch's logits while evaluating, 128 MiB in float32
PROTOCOL = (
    "joined text, tokenized once, cut into windows of one length that do not overlap; each window is run by itself and "
    "predicts all its tokens but the first"
)


@dataclass(frozen=True)
class Quality:
    """What `evaluate_text` measured over `tokens` predictions.

    `perplexity` as `PROTOCOL` says. Against a reference model: `kl`, the mean divergence KL(reference ‖ model) in
    nats per token, and `top1`, the share of positions where both rank the same token first.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def evaluate_text(
    model: PreTrainedModel, ids: Tensor, reference: PreTrainedModel | None = None, *, compute_dtype: str = "auto"
) -> Quality:
    """Measures perplexity over windows, and divergence from a reference model.

    Args:
        ids: `[windows, tokens]`, each window scored by itself on its `tokens - 1` predictions: the papers'
            protocol when the windows are cut from joined text (see `text_windows`).
        reference: the dense model, of the same vocabulary.
        compute_dtype: the precision of both models' forward passes, see `SparsityConfig`.

    Raises:
        ValueError: a model that does not predict the next token of the text it reads; ids outside the vocabulary, windows
            longer than the model's positions, models of different vocabularies.
    """
    scores = score_windows(model, ids, reference, compute_dtype=compute_dtype)
    tokens = int(scores.predictions.sum())
    loss = float(scores.loss.sum()) / tokens
    if scores.reference is None or scores.kl is None or scores.same is None:
        return Quality(math.exp(loss), tokens)
    return Quality(
        math.exp(loss),
        tokens,
        math.exp(float(scores.reference.sum()) / tokens),
        float(scores.kl.sum()) / tokens,
        float(scores.same.sum()) / tokens,
    )


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Sums over each window's predictions, arrays `[windows]`: what a bootstrap over windows or documents needs.

    `loss` and `reference` (the reference model's loss) in nats; `kl` = KL(reference ‖ model) in nats; `same` counts
    positions where both rank the same token first.
    """

    predictions: Array
    loss: Array
    reference: Array | None = None
    kl: Array | None = None
    same: Array | None = None


def score_windows(
    model: PreTrainedModel, ids: Tensor, reference: PreTrainedModel | None = None, *, compute_dtype: str = "auto"
) -> WindowScores:
    """Scores each window by itself; arguments and errors are those of `evaluate_text`."""
    for judged in (model, reference):
        if judged is not None:
            check_kind(judged)
            require_next_token(judged, "perplexity", decoder_only=True)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        shape = f"of shape {list(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(f"windows are a tensor of token ids [windows, tokens], not {shape}: text_windows makes them")
    vocabulary = getattr(text_config(model.config), "vocab_size", 2**17)
    size = max(1, LOGITS // (ids.shape[1] * vocabulary))
    batches = prepare_batches(model, [{"input_ids": rows} for rows in ids.split(size)])
    columns: list[list[Tensor]] = []
    with evaluating(model), computing_as(compute_dtype, model, reference), torch.no_grad():
        for batch in follow(batches, "Evaluating", "batch"):
            logits = model(**batch, use_cache=False).logits
            dense = None
            if reference is not None:
                with evaluating(reference):
                    dense = reference(**{k: v.to(reference.device) for k, v in batch.items()}, use_cache=False).logits
            scores = token_scores(batch, logits, dense, ranks=True)
            columns.append([scores.real.sum(1).cpu().double(), scores.sums(scores.loss)])
            if dense is not None and scores.kl is not None and scores.same is not None:
                columns[-1].append(next_token_losses(batch, dense)[0])
                columns[-1] += [scores.sums(scores.kl), scores.sums(scores.same)]
    return WindowScores(*(torch.cat(column).numpy() for column in zip(*columns, strict=True)))


def next_token_losses(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (summed cross-entropy in nats, number of predictions) of each sequence, float64, padding excluded."""
    scores = token_scores(batch, logits)
    return scores.sums(scores.loss), scores.real.sum(1).cpu().double()


def next_token_loss(batch: Batch, logits: Tensor) -> tuple[float, int]:
    """Returns (summed cross-entropy in nats, number of predictions) of a batch, padding excluded."""
    losses, counts = next_token_losses(batch, logits)
    return float(losses.sum()), int(counts.sum())


def text_windows(text: str, tokenizer: Any, length: int) -> Tensor:
    """Returns the tokens of a text in windows `[n, length]` that do not overlap; what is left at the end is dropped.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text or a smaller length"
        )
    return torch.tensor(ids[: count * length]).reshape(count, length)
