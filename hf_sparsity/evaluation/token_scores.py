"""The loss of each next token, and the divergence of a model from a reference there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.inference import Batch

POSITIONS = 2**23  # numbers of the logits that are compared at a time


@dataclass(frozen=True)
class TokenScores:
    """Scores of each prediction, `[sequences, tokens - 1]`, on the device of the logits.

    Args:
        real: True where the predicted token is text, False for padding.
        loss: cross-entropy of the next token in nats, float32.
        kl: KL(reference ‖ model) in nats, float32; None without a reference.
        same: True where both models rank the same token first; None unless asked for.
    """

    real: Tensor
    loss: Tensor
    kl: Tensor | None = None
    same: Tensor | None = None

    def sums(self, values: Tensor) -> Tensor:
        """Returns the sums of `values` over each sequence's real predictions, float64 on the CPU."""
        return values.masked_fill(~self.real, 0).sum(1).cpu().double()


def token_scores(
    batch: Batch,
    logits: Tensor,
    reference: Tensor | None = None,
    *,
    lowest: float | None = None,
    ranks: bool = False,
) -> TokenScores:
    """Scores every next token of a batch, in float32; gradients pass.

    Args:
        batch: with `input_ids`, or `decoder_input_ids` of an encoder-decoder, `[sequences, tokens]`.
        logits: the model's, `[sequences, tokens, vocabulary]`.
        reference: logits of the model to compare with, of the same shape.
        lowest: log-probabilities below this are taken for it, in nats, so that no score is infinite.
        ranks: also find where both models rank the same token first.

    Raises:
        ValueError: a batch without token ids, or models of different vocabularies.
    """
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None:
        raise ValueError("perplexity and divergence are measured on text: batches with input_ids are expected")
    if reference is not None and reference.shape != logits.shape:
        raise ValueError(
            f"the two models have vocabularies of {reference.shape[-1]} and {logits.shape[-1]}; they cannot be compared"
        )
    targets = ids[:, 1:].to(logits.device)
    size = max(1, POSITIONS // logits.shape[-1])
    both = [logits] if reference is None else [logits, reference.to(logits.device)]
    parts = [_log_probabilities(each, size, lowest) for each in both]
    loss, kl, same = [], [], []
    for target, model, *dense in zip(targets.flatten().split(size), *parts, strict=True):
        loss.append(F.nll_loss(model, target, reduction="none"))
        kl += [F.kl_div(model, other, log_target=True, reduction="none").sum(-1) for other in dense]
        same += [model.argmax(-1) == other.argmax(-1) for other in dense if ranks]
    whole = [torch.cat(part).reshape(targets.shape) if part else None for part in (loss, kl, same)]
    return TokenScores(_real(batch, targets), *whole)  # type: ignore[arg-type]


def _log_probabilities(logits: Tensor, size: int, lowest: float | None) -> Iterator[Tensor]:
    """Yields log-probabilities of the predictions, `[up to size, vocabulary]`, one sequence after the other."""
    for part in logits[:, :-1].flatten(0, 1).split(size):
        values = F.log_softmax(part.float(), dim=-1)
        yield values if lowest is None else values.clamp(min=lowest)


def _real(batch: Batch, targets: Tensor) -> Tensor:
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] != targets.shape[1] + 1:
        return torch.ones_like(targets, dtype=torch.bool)
    return mask[:, 1:].to(targets.device) != 0
