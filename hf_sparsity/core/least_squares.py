"""The layer problem: change a weight matrix as little as possible on its inputs, given where it may be non-zero.

With H = sum of x x^T over the calibration tokens, `tr((W' - W) H (W' - W)^T)` is the squared change of the outputs. Here
it is written in coordinates in which H has a unit diagonal: `A = H / (e e^T)`, `Y = W * e` with `e = sqrt(diag H)`.

Conjugate gradients on a fixed mask as in ALPS (Meng et al., NeurIPS 2024, https://arxiv.org/abs/2406.07831, section 3.3;
mazumder-lab/ALPS, alps.py, `cg_batch`), with two deliberate differences: it stops when the residual *on the mask* is
small (the authors' test looks at all entries and never passes), and rows that have converged are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-8  # added to the scale, and put for a denominator of 0; the authors'


@dataclass(frozen=True)
class Problem:
    """One Gram matrix in unit-diagonal coordinates; the layers fed by the same inputs share it.

    `matrix`: A, float32 `[in, in]`. `scale`: e, float32 `[in]`. `dead`: bool `[in]`, inputs that were always 0.
    """

    matrix: Tensor
    scale: Tensor
    dead: Tensor

    @classmethod
    def of(cls, gram: Tensor, ridge: float) -> Problem:
        """Adds `ridge` times the mean of the diagonal to it, and scales; `gram`: float32 `[in, in]`."""
        diagonal = gram.diagonal()
        dead = diagonal == 0
        damped = gram.clone()
        damped.diagonal().add_(ridge * diagonal.mean())
        scale = damped.diagonal().sqrt() + TINY
        return cls(damped / (scale[:, None] * scale), scale, dead)

    def error(self, change: Tensor) -> Tensor:
        """Returns the squared change of each row's output, ridge included, float32 `[out]`; `change`: scaled `[out, in]`."""
        return (change @ self.matrix).mul_(change).sum(1)


def solve_on_mask(
    problem: Problem, target: Tensor, start: Tensor, keep: Tensor, *, tolerance: float = 1e-4, limit: int = 100
) -> tuple[Tensor, int]:
    """Moves the kept weights of each row to their least-squares optimum by conjugate gradients.

    Args:
        problem: A and its scale.
        target: the dense weights in scaled coordinates, float32 `[out, in]`.
        start: where to begin, same shape, zero off the mask.
        keep: bool, same shape, True = kept.
        tolerance: a row is done when the norm of its residual on the mask is at most this share of that of
            `target A` on the mask. 0: never, all `limit` iterations are run (the authors' way).
        limit: iterations at most.

    Returns:
        (the weights in scaled coordinates, the iterations that the slowest row took).
    """
    solution = start.clone()
    residual = (target - solution) @ problem.matrix * keep
    bound = tolerance * (target @ problem.matrix * keep).norm(dim=1)
    direction, energy = residual.clone(), residual.square().sum(1)
    rows = torch.arange(len(target), device=target.device)
    mask = keep
    for iteration in range(limit):
        if tolerance > 0:
            active = energy.sqrt() > bound[rows]
            if not active.all():
                rows, mask = rows[active], mask[active]
                residual, direction, energy = residual[active], direction[active], energy[active]
            if not len(rows):
                return solution, iteration
        image = direction @ problem.matrix
        curvature = (direction * image).sum(1)
        step = energy / curvature.masked_fill(curvature == 0, TINY)
        solution[rows] += step[:, None] * direction
        residual -= step[:, None] * image
        residual *= mask
        before, energy = energy, residual.square().sum(1)
        direction = residual + (energy / before.masked_fill(before == 0, TINY))[:, None] * direction
    return solution, limit


def refit(
    weight: Tensor, pruned: Tensor, gram: Tensor, *, ridge: float = 0.01, tolerance: float = 1e-4, limit: int = 100
) -> tuple[Tensor, float, float]:
    """Sets the weights that survived to their least-squares optimum; no row gets worse by the measure that is minimised.

    Args:
        weight: the dense weights, `[out, in]`.
        pruned: what some pruner left of them, same shape; its non-zeros are the mask.
        gram: sum of x x^T, float32 `[in, in]`.
        ridge: relative to the mean of the Gram matrix' diagonal; 0 trusts the calibration text wholly.
        tolerance, limit: see `solve_on_mask`.

    Returns:
        (the new weights in the dtype of `pruned`, the error before, the error after), both relative to the outputs of
        `weight`, ridge included.
    """
    problem = Problem.of(gram.to(torch.float32), ridge)
    target = weight.to(problem.matrix) * problem.scale
    start = pruned.to(problem.matrix) * problem.scale
    keep = (pruned != 0).to(problem.matrix.device)
    solution, _ = solve_on_mask(problem, target, start, keep, tolerance=tolerance, limit=limit)
    new = (solution / problem.scale).to(pruned.dtype).to(pruned.device)
    lost = keep.to(pruned.device) & (new == 0)  # rounded to 0 in a narrow dtype: a survivor has to stay one
    new = torch.where(lost, pruned, new)
    before = problem.error(start - target)
    after = problem.error(new.to(problem.matrix) * problem.scale - target)
    worse = ~(after <= before)  # NaN counts as worse
    new[worse.to(new.device)] = pruned[worse.to(pruned.device)]
    whole = float(problem.error(target).sum())
    total = torch.where(worse, before, after)
    return new, *((float(e.sum()) / whole if whole > 0 else 0.0) for e in (before, total))  # type: ignore[return-value]
