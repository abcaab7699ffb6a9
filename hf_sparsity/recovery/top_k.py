"""Distillation by the teacher's likeliest tokens only: what is kept of its logits, and the divergence from that.

A teacher's distribution over the vocabulary V becomes one over k + 1 outcomes: its k likeliest tokens, and "another one".
The divergence of the student's distribution over the same outcomes is at most the full one, by the chain rule of relative
entropy, and equals it for k = V. Unlike a sum over k tokens alone it also pulls back what the student gives to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .losses import CHUNK

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of softened distributions.

    `log_probabilities`: float `[..., k]`, nats. `tokens`: int `[..., k]`. `rest`: float `[...]`, the log-probability of all
    other tokens together; -inf where there are none.
    """

    log_probabilities: Tensor
    tokens: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> TopK:
        """Returns the same on another device."""
        return TopK(self.log_probabilities.to(device), self.tokens.to(device), self.rest.to(device))


@torch.no_grad()
def top_k_of(logits: Tensor, k: int, *, temperature: float = 1.0, chunk: int = CHUNK) -> TopK:
    """Returns the k likeliest tokens of `softmax(logits / temperature)`; of all V if k is larger.

    Args:
        logits: `[..., vocabulary]`, any dtype; worked on in float32.
        k: number of tokens, at least 1.
        temperature: above 0.
        chunk: logits to convert at a time.
    """
    size = logits.shape[-1]
    flat = logits.detach().reshape(-1, size)
    parts = []
    for rows in flat.split(max(1, chunk // size)):
        scores = torch.log_softmax(rows.float() / temperature, -1)
        best, tokens = scores.topk(min(k, size), -1)
        others = scores.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        parts.append((best, tokens, others))
    shape = logits.shape[:-1]
    best, tokens, others = (torch.cat(same) for same in zip(*parts, strict=True))
    return TopK(best.reshape(*shape, -1), tokens.reshape(*shape, -1), others.reshape(shape))


class _TopKDivergence(torch.autograd.Function):
    """The sum of `T² KL` over k + 1 outcomes and chosen rows; keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, best: Tensor, tokens: Tensor, rest: Tensor, rows: Tensor, how: Any
    ) -> Tensor:
        ctx.save_for_backward(student, best, tokens, rest, rows)
        ctx.temperature, ctx.chunk = how
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for part in rows.split(ctx.chunk):
            ours, others = _student(student, tokens, part, ctx.temperature)
            p, left = best[part].float(), rest[part].float()
            mine = ours.gather(-1, tokens[part].long())
            total += (p.exp() * (p - mine)).sum()
            gone = left.exp() * (left - others.clamp_min(TINY).log())
            total += torch.where(left.isfinite(), gone, 0).sum()
        return total * ctx.temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        student, best, tokens, rest, rows = ctx.saved_tensors
        result = torch.zeros_like(student)
        for part in rows.split(ctx.chunk):
            ours, others = _student(student, tokens, part, ctx.temperature)
            # d/ds of T² KL is T (q - p) for the k tokens, and T q (1 - p_rest / q_rest) for each of the others.
            q = ours.exp()
            chosen = q.gather(-1, tokens[part].long()) - best[part].float().exp()
            q *= (1 - rest[part].float().exp() / others.clamp_min(TINY)).unsqueeze(-1)
            q.scatter_(-1, tokens[part].long(), chosen)
            result[part] = (q * (grads[0] * ctx.temperature)).to(result.dtype)
        return result, None, None, None, None, None


def _student(student: Tensor, tokens: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the student's log-probabilities `[rows, V]`, and the probability of all but the k tokens, summed directly."""
    ours = torch.log_softmax(student[rows].float() / temperature, -1)
    return ours, ours.exp().scatter(-1, tokens[rows].long(), 0.0).sum(-1)


def top_k_loss(
    student: Tensor, teacher: TopK, counted: Tensor | None = None, *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """Returns the sum of `T² KL(teacher ‖ student)` over the teacher's k likeliest tokens and "another one", in nats.

    Args:
        student: logits `[..., vocabulary]`.
        teacher: of the same `[...]`, softened by the same temperature.
        counted: bool `[...]`, True where the prediction counts; all by default.
        temperature: above 0.
        chunk: logits to work on at a time.

    Raises:
        ValueError: shapes that differ.
    """
    if student.shape[:-1] != teacher.rest.shape:
        raise ValueError(
            f"logits of {list(student.shape)} do not compare with stored ones of {list(teacher.rest.shape)} predictions"
        )
    size, theirs = student.shape[-1], teacher.to(student.device)
    mask = torch.ones(student.shape[:-1], dtype=torch.bool) if counted is None else counted
    rows = mask.reshape(-1).nonzero().reshape(-1).to(student.device)
    k = theirs.tokens.shape[-1]
    result: Tensor = _TopKDivergence.apply(
        student.reshape(-1, size),
        theirs.log_probabilities.reshape(-1, k),
        theirs.tokens.reshape(-1, k),
        theirs.rest.reshape(-1),
        rows,
        (float(temperature), max(1, chunk // size)),
    )
    return result
