"""The losses of distillation: functions of tensors that say how far a student is from its teacher.

All are sums over predictions, so that neither padding, nor how a batch is cut into chunks or accumulated from smaller
ones, changes the gradient. The divergence here is another function than evaluation's (`evaluation/divergence.py`): that
one gives a number for each token, clamped where a model cannot predict it; this one is softened by a temperature, and its
backward pass needs no copy of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24  # logits that are converted to float32 at a time: 64 MiB a tensor


class _SoftenedDivergence(torch.autograd.Function):
    """The sum of `T² KL(softmax(t / T) ‖ softmax(s / T))` over chosen rows; keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, chunk: int) -> Tensor:
        ctx.save_for_backward(student, teacher, rows)
        ctx.temperature, ctx.chunk = temperature, chunk
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for part in rows.split(chunk):
            ours, theirs = _log_probabilities(student, teacher, part, temperature)
            total += (theirs.exp() * (theirs - ours)).sum()
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        student, teacher, rows = ctx.saved_tensors
        result = torch.zeros_like(student)
        for part in rows.split(ctx.chunk):
            ours, theirs = _log_probabilities(student, teacher, part, ctx.temperature)
            # d/ds of T² KL is T (softmax(s / T) - softmax(t / T)).
            result[part] = ((ours.exp() - theirs.exp()) * (grads[0] * ctx.temperature)).to(result.dtype)
        return result, None, None, None, None


def _log_probabilities(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    theirs = teacher[rows.to(teacher.device)].to(student.device)
    ours, theirs = student[rows].float(), theirs.float()
    return torch.log_softmax(ours / temperature, -1), torch.log_softmax(theirs / temperature, -1)


def kl_loss(
    student: Tensor, teacher: Tensor, counted: Tensor | None = None, *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """Returns the sum of `T² KL(teacher ‖ student)` of softened next-token distributions (Hinton et al. 2015), in nats.

    The factor T² keeps the gradient's size the same whatever the temperature. It is computed in float32 whatever the
    logits' dtype, a few rows at a time in both passes, so that no float32 tensor of the logits' size is made.

    Args:
        student, teacher: logits `[..., vocabulary]`, of any devices; only the student's get a gradient.
        counted: bool `[...]`, True where the prediction counts; all by default.
        temperature: above 0.
        chunk: logits to work on at a time.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of {list(student.shape)} (student) and {list(teacher.shape)} (teacher) do not compare"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: a number above 0 is expected")
    size = student.shape[-1]
    mask = torch.ones(student.shape[:-1], dtype=torch.bool) if counted is None else counted
    rows = mask.reshape(-1).nonzero().reshape(-1).to(student.device)
    flat, theirs = student.reshape(-1, size), teacher.detach().reshape(-1, size)
    result: Tensor = _SoftenedDivergence.apply(flat, theirs, rows, float(temperature), max(1, chunk // size))
    return result


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Returns SquareHead, the relative error of hidden states (Kurtic et al. 2023, https://arxiv.org/abs/2310.06927).

    The error of a sequence is `Σ (s - t)² / Σ t²` over its counted positions and channels, averaged over the blocks. The
    result is the sum over sequences of error times counted positions. Divided by all counted positions that is the
    paper's `MSE(s, t) / MSE(t, 0)`, but normalised by sequence instead of by batch, so that gradients accumulated over
    parts of a batch equal those of the batch.

    Args:
        student, teacher: hidden states `[sequences, tokens, width]` of each block; only the student's get a gradient.
        counted: bool `[sequences, tokens]`.

    Raises:
        ValueError: numbers of blocks or shapes that differ.
    """
    if len(student) != len(teacher) or any(s.shape != t.shape for s, t in zip(student, teacher, strict=False)):
        raise ValueError(
            "student and teacher differ in the number or the width of their blocks: their hidden states do not compare"
        )
    total = torch.zeros((), dtype=torch.float32, device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        keep = counted.to(ours.device)
        theirs = theirs.detach().to(ours.device).float().masked_fill(~keep[..., None], 0)
        ours = ours.float().masked_fill(~keep[..., None], 0)
        error, size = (ours - theirs).square().sum((1, 2)), theirs.square().sum((1, 2))
        ratio = error / size.clamp_min(torch.finfo(torch.float32).tiny)
        total = total + (ratio * keep.sum(1)).sum().to(total.device)
    return total / len(student)
