"""ALPS: choose the weights that stay and their values together, by operator splitting on the layer problem.

Meng, Behdin, Wang and Mazumder, NeurIPS 2024, https://arxiv.org/abs/2406.07831.
Checked against the authors' code, mazumder-lab/ALPS, alps.py (`ALPS_prune.ALPS_admm`), where it differs from the paper.

In coordinates in which the damped Gram matrix A has a unit diagonal (`core/least_squares.py`), two copies of the weights
are drawn together by a penalty rho: B solves the ridge problem `(G - V + rho D) (A + rho I)^-1`, and D is its sparsest
neighbour, the largest entries of `B + V / rho`. Every third round, rho grows by how much D's support still changes; when
it rests, the largest entries of B are the mask, and conjugate gradients on it finish the values.

Deliberate differences: inputs that were never active keep nothing (the authors' ridge lets some of their weights stay);
the errors that the authors compute at each check, and nothing uses, are left out; the final conjugate gradients stop by
a test that can pass; N:M groups must divide a row; and where SparseGPT's result has the lower error it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..algorithm import GRAM, Cells, Citation, Layer, Pruner
from ..core import masks
from ..core.least_squares import Problem, solve_on_mask
from ..validation import check_number

CHECK = 3  # rounds between two looks at the support
SETTLED = 33  # from this round on, a change of fewer than FEW of the kept entries ends the search
FEW = 3e-4
LARGEST = 1e6  # of rho


@dataclass(frozen=True)
class ALPS(Pruner):
    """Chooses the mask and the values of the weights that stay together, for the smallest change of a layer's outputs.

    `compare="layer"`: the largest entries of the whole matrix stay, as published; rows may differ a lot. `"row"`: every
    row keeps the same number, or, with a row allocator, its own.
    """

    compare: str = "layer"
    ridge: float = 0.01  # lambda, relative to the mean of the Gram matrix' diagonal
    rho: float = 0.1  # the first penalty
    rounds: int = 300  # at most
    tolerance: float = 1e-5  # of the final conjugate gradients, relative residual on the mask

    name = "alps"
    paper = "https://arxiv.org/abs/2406.07831"
    summary = "mask and values chosen together by operator splitting; lower output errors than SparseGPT"
    citation = Citation(
        "meng2024alps",
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        "Xiang Meng and Kayhan Behdin and Haoyue Wang and Rahul Mazumder",
        2024,
        "2406.07831",
    )
    needs = frozenset({GRAM})
    updates_survivors = True
    stand_in = "the masks that the search of alps starts from, on the dense weights"
    checked_against = "sparsegpt"

    def __post_init__(self) -> None:
        if self.compare not in ("layer", "row"):
            raise ValueError(f"alps: compare is {self.compare!r}; it must be 'layer' or 'row'")
        check_number("alps: ridge", self.ridge, "(0, inf)")
        check_number("alps: rho", self.rho, "(0, inf)")
        check_number("alps: rounds", self.rounds, f"[{CHECK}, inf)", whole=True)

    def scores(self, layer: Layer) -> Tensor:
        """`|W_ij| e_j`, by which the search starts: Wanda's score with the ridge in the norm. Float32 `[out, in]`."""
        problem = Problem.of(layer.gram(self.name), self.ridge)
        return (layer.weight.to(problem.scale).abs() * problem.scale.masked_fill(problem.dead, 0)).to(
            layer.weight.device
        )

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """The mask that fixed `scores` give, bool `[out, in]`, True = kept; `prune` itself searches for a better one."""
        if self.compare == "row" or layer.rows is not None or layer.pattern.group is not None:
            return super().mask(layer, scores)
        return largest(scores, layer)

    def compared_within(self, layer: Layer) -> Cells | None:
        """The whole layer, or the base class' rows and groups."""
        if self.compare == "layer" and layer.pattern.group is None:
            return Cells(layer.weight.shape[1], across_rows=True)
        return super().compared_within(layer)

    def prune(self, layer: Layer) -> Tensor:
        """The new weight `[out, in]`, in the layer's dtype: zeros where pruned, the others updated."""
        return self.prune_sharing([layer])[0]

    def prune_sharing(self, layers: Sequence[Layer]) -> list[Tensor]:
        """`prune` for layers that share their `stats`, and so the eigendecomposition of their Gram matrix."""
        problem = Problem.of(layers[0].gram(self.name), self.ridge)
        searches = {i: Search(self, layer, problem) for i, layer in enumerate(layers) if self._is_open(layer)}
        running = list(searches.values())
        inverse = Inverse(problem.matrix) if searches else None
        while running and inverse is not None:
            running.sort(key=lambda search: search.rho)
            for rho, together in groupby(running, key=lambda search: search.rho):
                penalised = inverse.at(rho)
                for search in together:
                    search.advance(penalised)
            running = [search for search in running if not search.done]
        return [searches[i].result() if i in searches else self._as_it_is(layer) for i, layer in enumerate(layers)]

    def _is_open(self, layer: Layer) -> bool:
        """True if there is something to solve: not where all zeros are there, or nothing is known of the inputs."""
        known = layer.stats is not None and not layer.stats.is_flat
        return known and layer.sparsity > 0 and not layer.is_pruned(by_row=self.compare == "row")

    def _as_it_is(self, layer: Layer) -> Tensor:
        return self.prune_by_scores(layer) if layer.stats is not None and layer.stats.is_flat else layer.weight.clone()


class Inverse:
    """`(A + rho I)^-1` for any rho from one eigendecomposition, computed in float64, given in float32 `[in, in]`."""

    def __init__(self, matrix: Tensor) -> None:
        self._device = matrix.device
        self._values, self._vectors = torch.linalg.eigh(matrix.to(torch.float64))

    def at(self, rho: float) -> Tensor:
        """Returns the inverse at this penalty."""
        return (self._vectors / (self._values + rho) @ self._vectors.T).to(torch.float32)


@dataclass
class Search:
    """One layer's two copies, and when they are done. Tensors are float32 `[out, in]` in scaled coordinates."""

    pruner: ALPS
    layer: Layer
    problem: Problem
    rho: float = 0.0
    round: int = 0
    moved: bool = False
    done: bool = False
    checks: list[tuple[int, int, float]] = field(default_factory=list)  # (round, entries that changed, rho before)

    def __post_init__(self) -> None:
        self.rho = self.pruner.rho
        self.has_dead = bool(self.problem.dead.any())
        self.dense = self.layer.weight.to(self.problem.matrix) * self.problem.scale
        self.gradient = self.dense @ self.problem.matrix
        self.first = self._project(self.dense)
        self.smooth, self.sparse, self.dual = self.dense, self.first, torch.zeros_like(self.dense)
        self.support = self.first != 0
        self.kept = max(int(self.support.sum()), 1)

    def _project(self, values: Tensor) -> Tensor:
        alive = values.masked_fill(self.problem.dead, 0) if self.has_dead else values
        return alive * self.pruner.mask(self.layer, alive.abs())

    def advance(self, inverse: Tensor) -> None:
        """Runs the rounds up to the next check, with `(A + rho I)^-1`, and chooses the next rho or ends."""
        for _ in range(CHECK):
            self.round += 1
            self.smooth = (self.gradient - self.dual).add_(self.rho * self.sparse) @ inverse
            self.sparse = self._project((self.dual / self.rho).add_(self.smooth))
            self.dual = (self.smooth - self.sparse).mul_(self.rho).add_(self.dual)
        support = self.sparse != 0
        changed = int((support != self.support).sum())
        self.support = support
        self.checks.append((self.round, changed, self.rho))
        self._adapt(changed, changed / self.kept)
        settled = self.round >= SETTLED and changed / self.kept < FEW
        self.done = self.done or settled or self.round + CHECK > self.pruner.rounds

    def _adapt(self, changed: int, share: float) -> None:
        """The authors' table of what happens to rho; a support that never moved makes the search start again, softer."""
        if share > 0.1:
            self.moved, self.rho = True, self.rho * 1.3
        elif share > 0.005:
            self.moved, self.rho = True, self.rho * 1.2
        elif self.moved:
            self.rho *= 1.1 if changed else 1.0
            self.done = not changed
        else:
            self.rho /= 5
            if changed:
                self.smooth, self.sparse, self.dual = self.dense, self.first, torch.zeros_like(self.dense)
        self.rho = min(self.rho, LARGEST)

    def result(self) -> Tensor:
        """The weight `[out, in]` in the layer's dtype: the mask of B, its values finished by conjugate gradients."""
        start = self._project(self.smooth)
        values, _ = solve_on_mask(self.problem, self.dense, start, start != 0, tolerance=self.pruner.tolerance)
        return (values / self.problem.scale).to(self.layer.weight)


def largest(scores: Tensor, layer: Layer) -> Tensor:
    """The largest scores that the layer's sparsity leaves in the whole matrix; bool, True = kept."""
    flat = scores.reshape(1, -1)
    count = flat.shape[1] - round((1 - layer.sparsity) * flat.shape[1])
    return masks.keep_rows(flat, count).reshape(scores.shape)
