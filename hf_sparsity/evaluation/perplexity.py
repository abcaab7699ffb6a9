"""What a model is worth: measured sparsity, perplexity, divergence from the dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration.batches import prepare_batches
from ..model.accepted import check_kind
from ..model.classes import require_next_token, text_config
from ..model.inference import Batch, evaluating

Array = np.ndarray[Any, Any]

LOGITS = 2**25  # numbers in one batch's logits while evaluating: 128 MiB in float32


@dataclass(frozen=True)
class Quality:
    """What `evaluate_text` measured over `tokens` predictions.

    `perplexity` per token. Against a reference model: `kl`, the mean divergence KL(reference ‖ model) in
    nats per token, and `top1`, the share of positions where both rank the same token first.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def evaluate_text(model: PreTrainedModel, ids: Tensor, reference: PreTrainedModel | None = None) -> Quality:
    """Perplexity over windows, and divergence from a reference model.

    Args:
        ids: `[windows, tokens]`, each window scored by itself on its `tokens - 1` predictions: the papers'
            protocol when the windows are cut from joined text (see `text_windows`).
        reference: the dense model, of the same vocabulary.

    Raises:
        ValueError: a model that does not predict the next token of the text it reads.
    """
    scores = score_windows(model, ids, reference)
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


def score_windows(model: PreTrainedModel, ids: Tensor, reference: PreTrainedModel | None = None) -> WindowScores:
    """Scores each window by itself; arguments and errors as `evaluate_text`."""
    for judged in (model, reference):
        if judged is not None:
            check_kind(judged)
            require_next_token(judged, "perplexity", decoder_only=True)
    vocabulary = getattr(text_config(model.config), "vocab_size", 2**17)
    size = max(1, LOGITS // (ids.shape[1] * vocabulary))
    batches = prepare_batches(model, [{"input_ids": rows} for rows in ids.split(size)])
    columns: list[list[Tensor]] = []
    with evaluating(model), torch.no_grad():
        for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=None, leave=False):
            logits = model(**batch, use_cache=False).logits
            losses, counts = _sequence_losses(batch, logits)
            columns.append([counts, losses])
            if reference is not None:
                with evaluating(reference):
                    dense = reference(**{k: v.to(reference.device) for k, v in batch.items()}, use_cache=False).logits
                columns[-1].append(_sequence_losses(batch, dense)[0])
                columns[-1] += _sequence_divergences(dense[:, :-1], logits[:, :-1])
    return WindowScores(*(torch.cat(column).numpy() for column in zip(*columns, strict=True)))


def next_token_loss(batch: Batch, logits: Tensor) -> tuple[float, int]:
    """(summed cross-entropy in nats, number of predictions) of a batch's next tokens, padding excluded."""
    losses, counts = _sequence_losses(batch, logits)
    return float(losses.sum()), int(counts.sum())


def _sequence_losses(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`next_token_loss` of each sequence, float64 on the CPU."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None:
        raise ValueError("a loss needs text: batches with input_ids")
    targets = ids[:, 1:].to(logits.device)
    if "attention_mask" in batch and batch["attention_mask"].shape == ids.shape:
        targets = targets.masked_fill(batch["attention_mask"][:, 1:].to(logits.device) == 0, -100)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=-100
    )
    return losses.view(targets.shape).sum(1).cpu().double(), (targets != -100).sum(1).cpu().double()


def divergence(reference: Tensor, logits: Tensor) -> tuple[float, float]:
    """(summed KL(reference ‖ model) in nats, positions with the same first token), both `[sequences, tokens, vocabulary]`."""
    kl, same = _sequence_divergences(reference, logits)
    return float(kl.sum()), float(same.sum())


def _sequence_divergences(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`divergence` of each sequence, float64 on the CPU."""
    if reference.shape != logits.shape:
        raise ValueError(
            f"the two models have vocabularies of {reference.shape[-1]} and {logits.shape[-1]}; they cannot be compared"
        )
    dense = F.log_softmax(reference.to(logits.device).float(), dim=-1)
    sparse = F.log_softmax(logits.float(), dim=-1)
    kl = F.kl_div(sparse, dense, log_target=True, reduction="none").sum((1, 2))
    same = (dense.argmax(-1) == sparse.argmax(-1)).sum(1)
    return kl.cpu().double(), same.cpu().double()


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
