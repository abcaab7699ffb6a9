"""SparseGPT: prune column by column, and let the columns to the right make up for it.

Frantar and Alistarh, ICML 2023, https://arxiv.org/abs/2301.00774.
Checked against the authors' code, IST-DASLab/sparsegpt, sparsegpt.py (`SparseGPT.fasterprune`).

The authors invert the Hessian (Cholesky, inverse, Cholesky again) for the upper U with `H^-1 = U^T U`,
and carry scaled errors E with `W0 - W = E U`. But `H = F F^T` for the upper triangular `F = U^-1`, so the
same weights follow from F alone: one factorisation, no inverse. With the change of each weight
`D = W0 - W` we have `E = D F`; E is 0 where a weight is kept, so when the turn of column j comes,

    W_j = W0_j + (sum over i < j of D_i F_ij) / F_jj        and        U_jj = 1 / F_jj.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm import Cells, Citation, Layer, Pruner
from ..core import masks
from ..core.stats import GRAM
from ..validation import check_number

logger = logging.getLogger(__name__)

STEP = 16  # columns solved one by one before a matrix product carries them on; 8 to 32 are as fast
SMALL = 16  # largest group whose order is found by comparing pairs
RETRIES = 8  # of the factorisation, each with ten times the damping


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Removes the weights that cost least by second-order information, and updates the others.

    Unstructured: one threshold per layer and column block, so every block of `block_size` columns
    gets the layer's sparsity and rows differ. N:M: decided group by group on the updated weights.
    With row sparsities each row loses its own count, spread evenly over the blocks (exactly
    `layer.counts` in sum).

    Pruning a pruned layer again changes nothing: zeros score 0, are chosen first and change no other weight.
    """

    damping: float = 0.01  # percdamp: added to the diagonal, relative to its mean
    block_size: int = 128  # B in the paper, B = B_s: columns per threshold

    name = "sparsegpt"
    paper = "https://arxiv.org/abs/2301.00774"
    summary = "second-order scores, and the weights that stay make up for those that go"
    citation = Citation(
        "frantar2023sparsegpt",
        "{SparseGPT}: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Elias Frantar and Dan Alistarh",
        2023,
        "2301.00774",
    )
    needs = frozenset({GRAM})
    updates_survivors = True

    def __post_init__(self) -> None:
        check_number("sparsegpt: damping", self.damping, "(0, inf)", hint=", such as 0.01")
        check_number("sparsegpt: block_size", self.block_size, "[1, inf)", whole=True, hint=", such as 128")

    def scores(self, layer: Layer) -> Tensor:
        """`|W_ij| U_jj^-1`, the root of the paper's saliency; 0 in dead columns. Float32 `[out, in]`."""
        factor, dead = factorize(hessian(layer), damping=self.damping, name=layer.name)
        scale = factor.diagonal().masked_fill(dead, 0)
        return (layer.weight.to(scale).abs() * scale).to(layer.weight.device)

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """The mask that fixed `scores` give, block by block; bool `[out, in]`, True = kept.

        `prune` itself scores each block anew, after the columns before it moved the weights.
        """
        width = scores.shape[1]
        if layer.pattern.group is not None:
            return super().mask(layer, scores)
        blocks = [(b, min(b + self.block_size, width)) for b in range(0, width, self.block_size)]
        return torch.cat([~choose(layer, scores[:, b:e], begin=b) for b, e in blocks], dim=1)

    def compared_within(self, layer: Layer) -> Cells | None:
        """Returns all rows of `block_size` columns as one cell, or the base class' groups."""
        return super().compared_within(layer) if layer.pattern.group else Cells(self.block_size, across_rows=True)

    def prune(self, layer: Layer) -> Tensor:
        """The new weight `[out, in]`, in the layer's dtype: zeros where pruned, the others updated.

        Weights of dead inputs go as well, as in the authors' code; at sparsity 0 nothing changes.
        """
        return self.prune_sharing([layer])[0]

    def prune_sharing(self, layers: Sequence[Layer]) -> list[Tensor]:
        """`prune` for layers that share their `stats`, and so one factorisation."""
        return solve(layers, hessian(layers[0]), damping=self.damping, block_size=self.block_size)


def hessian(layer: Layer) -> Tensor:
    """`2 / sequences` times the sum of `x x^T`, float32 `[in, in]`, as the authors' `add_batch` scales it.

    The scale matters only beside dead columns, whose diagonal is set to 1. A layer that no token
    reached (an expert never chosen) gets the identity: nothing is known, so magnitude decides.
    """
    stats = layer.stats
    if stats is None or GRAM not in stats.needs:
        raise ValueError(f"{layer.name}: sparsegpt needs the Gram matrix of the inputs; collect it by naming GRAM")
    if stats.gram is None or not stats.gram.diagonal().any():
        logger.warning("%s: no input reached this layer; sparsegpt falls back to magnitudes", layer.name)
        return torch.eye(layer.weight.shape[1], device=layer.weight.device)
    return stats.gram * (2 / max(stats.sequences, 1))


def factorize(hessian: Tensor, *, damping: float, name: str = "layer") -> tuple[Tensor, Tensor]:
    """The upper triangular F with `F F^T = H + damping`, and the dead columns.

    `hessian`: float32 `[in, in]`. Returns float32 `[in, in]` and bool `[in]`. Raises `ValueError`
    for NaN or infinity; where the matrix is not positive definite, the damping grows tenfold.
    """
    if not torch.stack(hessian.aminmax()).isfinite().all():
        raise ValueError(f"{name}: the Gram matrix of its inputs holds NaN or infinity; look for overflow in the model")
    # The lower factor of H with rows and columns reversed is the upper one we want, reversed.
    flipped = hessian.flip(0, 1)
    diagonal = flipped.diagonal()
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    shift, added = damping * float(diagonal.mean()), 0.0
    for _ in range(RETRIES):
        diagonal += shift - added
        added = shift
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not failed and lower.diagonal().isfinite().all():
            return lower.flip(0, 1), dead.flip(0)
        shift *= 10
        logger.warning("%s: the Hessian is not positive definite; damping raised to %.3g", name, shift)
    raise ValueError(f"{name}: the Hessian is not positive definite even with damping {added:.3g}; use more text")


def solve(layers: Sequence[Layer], hessian: Tensor, *, damping: float = 0.01, block_size: int = 128) -> list[Tensor]:
    """Prunes layers with the same inputs; each has its own threshold, sparsity, pattern and rows.

    `hessian`: float32 `[in, in]`, at the authors' scale. Returns the new weights `[out, in]` in each
    layer's dtype; a layer of sparsity 0 comes back as it was. `ValueError`: a Hessian or a pattern
    that cannot be used.
    """
    results = [layer.weight.clone() for layer in layers]
    todo = [i for i, layer in enumerate(layers) if prunes(layer)]
    if not todo:
        return results
    factor, dead = factorize(hessian, damping=damping, name=layers[todo[0]].name)
    scale = factor.diagonal().clone()
    factor /= -scale  # [i, j]: how column j must move when column i moved by one
    for group in {layers[i].pattern.group for i in todo}:
        same = [i for i in todo if layers[i].pattern.group == group]
        base = torch.cat([layers[i].weight.to(scale) for i in same]).T.contiguous()
        base[dead] = 0
        new = sweep(base, factor, scale, [layers[i] for i in same], block_size=block_size)
        parts = torch.split(new.T, [layers[i].weight.shape[0] for i in same])
        for i, part in zip(same, parts, strict=True):
            results[i] = part.to(results[i]).contiguous()
    return results


def prunes(layer: Layer) -> bool:
    """Returns whether the plan takes anything from this layer; `ValueError` for a pattern that cannot be met."""
    kept, group, width = layer.pattern.kept, layer.pattern.group, layer.weight.shape[1]
    if group is None:
        return layer.sparsity > 0 if layer.rows is None else bool(torch.as_tensor(layer.counts).any())
    if kept is None:
        raise ValueError(f"{layer.name}: pattern {layer.pattern} must be resolved to N:M before pruning")
    if width % group:
        raise ValueError(f"{layer.name}: pattern {layer.pattern} does not divide the layer's width {width}")
    return True


def sweep(base: Tensor, factor: Tensor, scale: Tensor, layers: Sequence[Layer], *, block_size: int) -> Tensor:
    """The sequential solve, left to right, for all rows of all layers at once.

    Transposed, so that a column of the weight is contiguous: `base` is `[in, rows]` with the rows of
    `layers` side by side, all of one group size. `factor`: `[in, in]`, `-F_ij / F_jj`. `scale`:
    `[in]`, `F_jj`. Returns the new weight, `[in, rows]`.

    A row's masked triangular system differs from its neighbours', so the columns of a step go one
    by one; all else is matrix products. Each column only *reads* the changes to its left.
    """
    width = base.shape[0]
    group = layers[0].pattern.group
    if group is not None:  # a group never straddles two blocks; the authors' 128 with 2:4 and 4:8 is as it was
        block_size = max(block_size // group, 1) * group
    change = torch.empty_like(base)  # W0 - W: all of a pruned weight, minus the update of a kept one
    pruned = torch.empty_like(base, dtype=torch.bool)
    for b in range(0, width, block_size):
        e = min(b + block_size, width)
        move = factor[:b, b:e].T @ change[:b]  # [block, rows]: what a kept weight of this block changes by
        if group is None:
            pick(pruned[b:e], base[b:e] - ahead(factor[b:e, b:e], move), scale[b:e], layers, begin=b)
        step = group or STEP
        for s in range(b, e, step):
            t = min(s + step, e)
            move[s - b : t - b].addmm_(factor[b:s, s:t].T, change[b:s])
            if group is not None:
                now = base[s:t] - ahead(factor[s:t, s:t], move[s - b : t - b])
                pick(pruned[s:t], now, scale[s:t], layers, begin=s)
            for j in range(s, t):
                here = torch.addmv(move[j - b], change[s:j].T, factor[s:j, j])
                torch.where(pruned[j], base[j], here, out=change[j])
    return base - change


def ahead(factor: Tensor, move: Tensor) -> Tensor:
    """Returns how far columns have moved before the first of them is pruned, each also following those to its left.

    `factor`: `[columns, columns]`, as in `sweep`. `move`: `[columns, rows]`, what comes from before.
    """
    solved: Tensor = torch.linalg.solve_triangular(-factor.T, move, upper=False, unitriangular=True)
    return solved


def pick(pruned: Tensor, weights: Tensor, scale: Tensor, layers: Sequence[Layer], *, begin: int) -> None:
    """Fills `pruned` (bool `[columns, rows]`) from the current `weights`, same shape; `scale`: `[columns]`."""
    scores = weights.square_().mul_(scale.square()[:, None])
    sizes = [layer.weight.shape[0] for layer in layers]
    for layer, out, part in zip(layers, torch.split(pruned, sizes, 1), torch.split(scores, sizes, 1), strict=True):
        kept, group = layer.pattern.kept, layer.pattern.group
        if kept is not None and group is not None and group <= SMALL:
            torch.lt(ranks(part), group - kept, out=out)
        else:
            out.copy_(choose(layer, part.T, begin=begin).T)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each score in its column, 0 = lowest, ties by row; `[group, n]`, as `masks.ranks_in_groups`.

    By comparing all pairs: for few rows and many columns much faster than sorting.
    """
    group = len(scores)
    first = torch.ones(group, group, dtype=torch.bool, device=scores.device).tril(-1)[:, :, None]
    lower = scores < scores[:, None]  # [i, k]: k below i
    lower |= (scores == scores[:, None]) & first
    return lower.sum(1)


def choose(layer: Layer, scores: Tensor, *, begin: int) -> Tensor:
    """Returns which weights of the columns from `begin` on go; `scores` and result (bool, True = pruned) `[out, columns]`.

    A single threshold is inclusive, at index `int(n * sparsity)` of the sorted scores, as in the
    authors' code: one more than that goes, and all ties. Row counts are spread by rounding down
    their running sum, so that the blocks of a row add up to its count exactly.
    """
    width, end = layer.weight.shape[1], begin + scores.shape[1]
    kept, group = layer.pattern.kept, layer.pattern.group
    if kept is not None and group is not None:
        return ~masks.keep_groups(scores, kept, group)
    if layer.rows is not None:
        counts = torch.as_tensor(layer.counts).to(scores.device)
        return ~masks.keep_rows(scores, counts * end // width - counts * begin // width)
    if layer.sparsity <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    index = min(int(scores.numel() * layer.sparsity), scores.numel() - 1)
    return scores <= masks.smallest(scores, index)
