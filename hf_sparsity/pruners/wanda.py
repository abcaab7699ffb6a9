"""Wanda: prune by weight and activation.

Sun et al., ICLR 2024, https://arxiv.org/abs/2306.11695.
Checked against locuslab/wanda, `lib/prune.py`, `prune_wanda` and `return_given_alpha`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithm import NORMS, Cells, Citation, Layer, Pattern, Pruner


@dataclass(frozen=True)
class Wanda(Pruner):
    """Keeps, in each row, the weights with the largest |W_ij|·‖x_j‖, where ‖x_j‖ is the norm of input j.

    `variant=True` is the authors' `use_variant`: rows are cut where the cumulated scores reach a
    common share of the row's sum, so that rows differ in sparsity; unstructured only.
    """

    variant: bool = False

    name = "wanda"
    paper = "https://arxiv.org/abs/2306.11695"
    summary = "the smallest products of weight and input norm go; and the paper's variant"
    citation = Citation(
        "sun2023simple",
        "A Simple and Effective Pruning Approach for Large Language Models",
        "Mingjie Sun and Zhuang Liu and Anna Bair and J. Zico Kolter",
        2023,
        "2306.11695",
    )
    needs = frozenset({NORMS})

    def check(self, pattern: Pattern, has_rows: bool) -> None:
        """Raises ValueError for the variant with N:M groups or row sparsities, which it cannot honour."""
        if self.variant and (pattern.group is not None or has_rows):
            raise ValueError(
                "wanda with variant=True sets its own row sparsities: use pattern='unstructured' and no row_allocator"
            )

    def scores(self, layer: Layer) -> Tensor:
        """|W|·‖x‖, float32 `[out, in]`."""
        return layer.norm_scores(self.name)

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """The base class' mask, or the variant's; bool `[out, in]`."""
        return _variant_mask(scores, layer.sparsity) if self.variant else super().mask(layer, scores)

    def compared_within(self, layer: Layer) -> Cells | None:
        """The base class' rows and groups; None for the variant, whose rows lose unequally many."""
        return None if self.variant else super().compared_within(layer)


def _variant_mask(scores: Tensor, target: float) -> Tensor:
    """Bisects one share `alpha` of each row's score sum until the matrix has sparsity `target` to 0.001.

    The constants 0.4, [0, 0.8] and 0.001 are the authors'. A row in which even the smallest score
    exceeds its share keeps everything (the authors' code indexes position -1 there and crashes).
    """
    ordered = scores.sort(dim=1, stable=True).values
    cumulated = ordered.cumsum(dim=1)
    sums = scores.sum(dim=1, keepdim=True)

    def keep(alpha: float) -> Tensor:
        counts = (cumulated <= sums * alpha).sum(dim=1, keepdim=True)
        thresholds = ordered.gather(1, (counts - 1).clamp(min=0))
        return (scores > thresholds) | (counts == 0)

    if target <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    alpha, low, high = 0.4, 0.0, 0.8
    mask = keep(alpha)
    while abs((sparsity := 1 - mask.float().mean().item()) - target) > 0.001 and high - low >= 0.001:
        if sparsity > target:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask = keep(alpha)
    return mask
