"""ADMM-Grad: the fast relative of ALPS, with one inverse and a fixed number of rounds.

Boza, 2024, Fast and Effective Weight Update for Pruned Large Language Models, https://arxiv.org/abs/2401.02938.
Checked against the authors' code, fmfi-compbio/admm-pruning, lib/admm.py (`AdmmPruner.fasterprune`).

In coordinates in which the Gram matrix has a unit diagonal, a ridge is added and the weights w solve
`(G + Z - U) (A + I)^-1`, where Z is w + U on the mask and U collects what the mask takes away. The mask is chosen anew
in the first rounds and then fixed.

Deliberate differences: any N:M (the authors' code makes 2:4 of all), per-row counts, and `ramp=True`, which uses the
cubic ramp that their unstructured branch computes and ignores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algorithm import GRAM, Cells, Citation, Layer, Pruner
from ..core import masks
from ..core.least_squares import Problem
from ..validation import check_number


@dataclass(frozen=True)
class ADMM(Pruner):
    """Chooses the mask in `choosing` rounds while the weights that stay make up for those that went, then finishes."""

    ridge: float = 0.1  # percdamp: added to the diagonal after scaling, relative to its mean
    rounds: int = 20  # in all
    choosing: int = 15  # of them with a new mask
    ramp: bool = False  # raise the sparsity over those rounds instead of asking for all of it from the first

    name = "admm"
    paper = "https://arxiv.org/abs/2401.02938"
    summary = "mask and values by a few rounds of operator splitting: most of ALPS' gain, faster"
    citation = Citation(
        "boza2024fast",
        "Fast and Effective Weight Update for Pruned Large Language Models",
        "Vladim{\\'\\i}r Bo{\\v z}a",
        2024,
        "2401.02938",
    )
    needs = frozenset({GRAM})
    updates_survivors = True
    stand_in = "the masks that the search of admm starts from, on the dense weights"

    def __post_init__(self) -> None:
        check_number("admm: ridge", self.ridge, "(0, inf)", hint=", such as 0.1")
        check_number("admm: rounds", self.rounds, "[1, inf)", whole=True)
        check_number("admm: choosing", self.choosing, f"[1, {self.rounds}]", whole=True, hint=", the rounds")

    def scores(self, layer: Layer) -> Tensor:
        """`|W_ij| norm(x_j)`, by which the first mask is chosen; float32 `[out, in]`."""
        problem = self._problem(layer)
        return (layer.weight.to(problem.scale).abs() * problem.scale).to(layer.weight.device)

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """The mask that fixed `scores` give; bool `[out, in]`, True = kept. `prune` chooses anew as the weights move."""
        return self._mask(layer, scores, 1.0)

    def compared_within(self, layer: Layer) -> Cells | None:
        """The whole layer, or the base class' groups."""
        return super().compared_within(layer) if layer.pattern.group else Cells(layer.weight.shape[1], across_rows=True)

    def prune(self, layer: Layer) -> Tensor:
        """The new weight `[out, in]`, in the layer's dtype: zeros where pruned, the others updated."""
        return self.prune_sharing([layer])[0]

    def prune_sharing(self, layers: Sequence[Layer]) -> list[Tensor]:
        """`prune` for layers that share their `stats`, and so one inverse."""
        flat = [layer.stats is None or layer.stats.is_flat for layer in layers]
        done = [layer.sparsity <= 0 or layer.is_pruned(by_row=False) for layer in layers]
        results = [
            self.prune_by_scores(x) if blind else x.weight.clone() for x, blind in zip(layers, flat, strict=True)
        ]
        todo = [i for i in range(len(layers)) if not flat[i] and not done[i]]
        if todo:
            new = self._solve([layers[i] for i in todo], self._problem(layers[0]))
            for i, weight in zip(todo, new, strict=True):
                results[i] = weight.to(layers[i].weight)
        return results

    def _problem(self, layer: Layer) -> Problem:
        problem = Problem.of(layer.gram(self.name), 0.0)
        problem.matrix.diagonal().add_(self.ridge * problem.matrix.diagonal().mean())
        return problem

    def _solve(self, layers: Sequence[Layer], problem: Problem) -> list[Tensor]:
        """The new weights of layers with the same inputs, whose rows are solved side by side; float32."""
        penalised = problem.matrix.clone()
        penalised.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalised))
        sizes = [layer.weight.shape[0] for layer in layers]
        weights = torch.cat([layer.weight.to(problem.matrix) for layer in layers]) * problem.scale
        gradient = weights @ problem.matrix
        dual = torch.zeros_like(weights)
        keep = torch.ones_like(weights, dtype=torch.bool)
        for number in range(self.rounds):
            both = weights.add_(dual)
            if number < self.choosing:
                share = 1 - (1 - (number + 1) / self.choosing) ** 3
                scores = both.abs().split(sizes)
                keep = torch.cat([self._mask(x, part, share) for x, part in zip(layers, scores, strict=True)])
            sparse = both * keep
            dual = both.sub_(sparse)
            weights = sparse.add_(gradient).sub_(dual) @ inverse
        new: Tensor = (weights + dual) * keep / problem.scale
        return list(new.split(sizes))

    def _mask(self, layer: Layer, scores: Tensor, share: float) -> Tensor:
        """The mask at this share of the layer's final sparsity: for N:M and rows always, else if there is a ramp."""
        kept, group = layer.pattern.kept, layer.pattern.group
        if kept is not None and group is not None:
            return _groups(scores, kept, group, share)
        if group is not None:
            return super().mask(layer, scores)  # which refuses `*:M` that is not resolved
        if layer.rows is not None:
            return masks.keep_rows(scores, replace(layer, rows=layer.rows * share).counts)
        sparsity = layer.sparsity * (share if self.ramp else 1.0)
        flat = scores.reshape(1, -1)
        return masks.keep_rows(flat, int(flat.shape[1] * sparsity)).reshape(scores.shape)


def _groups(scores: Tensor, kept: int, group: int, share: float) -> Tensor:
    """N:M at a share of its sparsity: the N largest of each group are safe, the smallest others of the matrix go."""
    safe = masks.keep_groups(scores, kept, group)
    flat = scores.masked_fill(safe, torch.inf).reshape(1, -1)
    count = int(flat.shape[1] * (1 - kept / group) * share)
    return masks.keep_rows(flat, count).reshape(scores.shape)
