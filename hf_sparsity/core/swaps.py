"""Exchange kept and removed weights, one for one within a row, as long as that lowers the error of the layer's outputs.

In the coordinates of `core/least_squares.py`, let the kept weights x of a row be at their least-squares optimum, and g be
minus half the gradient of the error, which is then zero on the mask. With T the mask, and the other kept weights
following, removing weight i costs `x_i^2 d_i` and letting weight j in wins `g_j^2 / d_j`, where
`1 / d_i = [A_TT^-1]_ii` (T with i), the curvature that is left of a weight when the others make up for it. It is computed
for a few rows and averaged: the rows of a layer share A. In a round each row tries its best exchanges by these estimates,
all at once; conjugate gradients find the weights on the new mask, and the row takes it only if its error fell. Where it
did not, the next round tries half as many. So the error of no row ever rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .least_squares import Problem, solve_on_mask

SAMPLED = 8  # rows by which the curvatures are estimated
ROUNDS = 60  # at most
FIRST = 1 / 8  # share of its kept weights that a row exchanges in the first round
LEAST = 1e-6  # share of its error by which a row must gain for an exchange to count
TOLERANCE, ITERATIONS = 1e-3, 30  # of the conjugate gradients of a round
LARGEST = 1 << 24  # weights that are worked on at a time: 64 MiB in float32, several times
SMALLEST = 1e-6  # of a curvature: below it rounding decides


def swap(
    weight: Tensor, pruned: Tensor, gram: Tensor, *, ridge: float = 0.01, group: int | None = None, rounds: int = ROUNDS
) -> Tensor:
    """Returns better weights, in the dtype of `pruned`; the number of zeros of every row, and of every group, stays.

    Args:
        weight: the dense weights, `[out, in]`.
        pruned: what some pruner left of them, same shape; its non-zeros are the mask.
        gram: sum of x x^T, float32 `[in, in]`; inputs that were always 0 take no weight back.
        ridge: above 0, relative to the mean of the Gram matrix' diagonal.
        group: of an N:M pattern: its M, the consecutive inputs within which exchanges stay.
        rounds: at most.
    """
    problem = Problem.of(gram.to(torch.float32), ridge)
    curvature = curvatures(problem, pruned != 0)
    size = max(1, LARGEST // weight.shape[1])
    parts = []
    for dense, start in zip(weight.split(size), pruned.split(size), strict=True):
        search = _Search.of(problem, dense, start, curvature, group)
        for _ in range(rounds):
            if not len(search.rows):
                break
            search.round()
        new = torch.where(search.keep & problem.dead, dense, search.values / problem.scale).to(start)
        lost = ((new == 0) & search.keep.to(new.device)).any(1)  # a narrow dtype rounds to 0: one zero too many
        parts.append(torch.where(lost[:, None], start, new))
    return torch.cat(parts)


def curvatures(problem: Problem, keep: Tensor) -> Tensor:
    """Returns d of the module's docstring, float32 `[in]`, its mean over a few rows of the mask `keep` (bool `[out, in]`)."""
    matrix = problem.matrix
    total = torch.zeros_like(problem.scale)
    chosen = torch.linspace(0, len(keep) - 1, min(SAMPLED, len(keep))).round().long()
    for mask in keep[chosen.to(keep.device)].to(matrix.device):
        inside = mask.nonzero()[:, 0]
        factor = torch.linalg.cholesky(matrix[inside][:, inside])
        inverse = torch.cholesky_inverse(factor)
        explained = torch.linalg.solve_triangular(factor, matrix[inside], upper=False).square_().sum(0)
        left = matrix.diagonal() - explained
        left[inside] = 1 / inverse.diagonal()
        total += left.clamp_(min=SMALLEST)
    return total / len(chosen)


@dataclass
class _Search:
    """The rows of a layer on their way: `rows` are the numbers of those that still go on."""

    problem: Problem
    target: Tensor
    keep: Tensor
    values: Tensor  # scaled, the least-squares optimum on `keep`
    curvature: Tensor  # [in]
    group: int | None

    @classmethod
    def of(cls, problem: Problem, weight: Tensor, pruned: Tensor, curvature: Tensor, group: int | None) -> _Search:
        """Begins at the least-squares optimum on the mask of `pruned`; both weights `[out, in]`, not scaled."""
        target, start = (one.to(problem.matrix) * problem.scale for one in (weight, pruned))
        keep = start != 0
        # What an input that was always 0 gets changes no output, whatever the ridge says: it is the first to go.
        target, start = (one.masked_fill_(problem.dead, 0) for one in (target, start))
        values, _ = solve_on_mask(problem, target, start, keep)
        return cls(problem, target, keep, values, curvature, group)

    def __post_init__(self) -> None:
        self.error = self.problem.error(self.values - self.target)
        self.amount = (self.keep.sum(1) * FIRST).long().clamp_(min=1)
        self.rows = torch.arange(len(self.values), device=self.values.device)

    def round(self) -> None:
        """Tries each row's best exchanges, and keeps those that made it better."""
        values, keep, target = self.values[self.rows], self.keep[self.rows], self.target[self.rows]
        gradient = (target - values) @ self.problem.matrix
        cost = (values.square() * self.curvature).masked_fill_(~keep, torch.inf)
        gain = (gradient.square() / self.curvature).masked_fill_(keep | self.problem.dead, -torch.inf)
        out, back, wins = self._pairs(cost, gain)
        keep = keep.scatter(1, out, keep.gather(1, out) & ~wins)
        keep.scatter_(1, back, keep.gather(1, back) | wins)
        start = values + (gradient / self.curvature).masked_fill_(self.keep[self.rows], 0)
        start *= keep
        start, _ = solve_on_mask(self.problem, target, start, keep, tolerance=TOLERANCE, limit=ITERATIONS)
        error = self.problem.error(start - target)
        better = wins.any(1) & (error < self.error[self.rows] * (1 - LEAST))
        done = self.rows[better]
        self.values[done], self.keep[done], self.error[done] = start[better], keep[better], error[better]
        self.amount[self.rows] = torch.where(better, wins.sum(1), wins.sum(1) // 2)
        self.rows = self.rows[self.amount[self.rows] > 0]

    def _pairs(self, cost: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(columns to remove, columns to let in, bool: worth it and within the row's amount), each `[rows, pairs]`."""
        most = int(self.amount[self.rows].max())
        if self.group is None:
            cheap, rich = (
                x.topk(min(most, x.shape[1]), 1, largest=large) for x, large in ((cost, False), (gain, True))
            )
            out, back, win = cheap.indices, rich.indices, rich.values - cheap.values
        else:
            shape = (len(cost), -1, self.group)
            lowest, highest = cost.view(shape).min(2), gain.view(shape).max(2)
            win, places = (highest.values - lowest.values).topk(min(most, lowest.values.shape[1]), 1)
            out, back = (places * self.group + best.gather(1, places) for best in (lowest.indices, highest.indices))
        within = torch.arange(win.shape[1], device=win.device) < self.amount[self.rows, None]
        return out, back, within & (win > 0)
