"""OWL: outlier-weighed layerwise sparsity.

Yin et al., ICML 2024, https://arxiv.org/abs/2310.05175.
Checked against the authors' code, luuyin/OWL, lib/prune_all.py (prune_wanda_outlier and
prune_wanda_outlier_structure).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..algorithm import NORMS, Allocator, Layer, Probe, Pruner
from ..core.outliers import outlier_percent


@dataclass(frozen=True)
class OWL(Allocator):
    """Blocks with more outliers keep more weights.

    A weight is an outlier when its Wanda score `|W_ij| * norm(x_j)` exceeds `outlier` times the mean score of
    its block, whatever the pruner. No block strays more than `2 * spread` from another; with the pattern `*:M`
    the numbers pruned of M differ by at most `group_spread`.

    Deliberate differences: equal outlier ratios give uniform (the authors' code divides by zero), and with
    `*:M` at least one weight of M is kept.
    """

    outlier: float = 5.0  # M in the paper
    spread: float = 0.08  # lambda in the paper
    group_spread: float = 2.0  # lambda of the authors' N:M runs, in weights of a group

    name = "owl"
    paper = "https://arxiv.org/abs/2310.05175"
    needs = frozenset({NORMS})
    mixes = True

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """The block's outliers in percent of its weights, D, the same for each of its layers."""
        if not block:
            return {}
        count = sum(layer.weight.numel() for layer in block.values())
        percent = outlier_percent((_wanda_scores(layer) for layer in block.values()), count, self.outlier)
        return dict.fromkeys(block, percent)

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: Probe | None = None,
    ) -> dict[str, float]:
        """The published mapping: the same sparsity for all layers of a block.

        The mean that is held is the one over blocks, unweighted by size. A sparsity of 0 or less becomes 0.01;
        there is no cap. `*:M`: the authors' "structure" variant, rounded half to even.
        """
        blocks = [block for block in measures if block]
        shares = _shares([float(next(iter(block.values()))) for block in blocks])
        if group is None:
            mean = math.fsum(2 * self.spread * u for u in shares) / max(len(shares), 1)
            density = [2 * self.spread * u - mean + (1 - target) for u in shares]
            sparsities = [0.01 if 1 - d <= 0 else 1 - d for d in density]
            if not any(shares):
                sparsities = [target] * len(shares)
        else:
            mean = math.fsum(self.group_spread * u for u in shares) / max(len(shares), 1)
            pruned = [round(target * group) - round(self.group_spread * u - mean) for u in shares]
            sparsities = [min(max(n, 0), group - 1) / group for n in pruned]
        return {name: s for block, s in zip(blocks, sparsities, strict=True) for name in block}


def _wanda_scores(layer: Layer) -> torch.Tensor:
    """`|W| * norm(x)`, float32 `[out, in]`."""
    if layer.stats is None:
        raise ValueError(f"{layer.name}: OWL needs the norms of the layer's inputs, and none were collected")
    return layer.weight.abs().to(torch.float32) * layer.stats.norms.reshape(1, -1)


def _shares(percents: Sequence[float]) -> list[float]:
    """Outlier ratios scaled to [0, 1]; all 0 when they are equal or not numbers."""
    low, high = min(percents, default=0.0), max(percents, default=0.0)
    if not math.isfinite(math.fsum(percents)) or low == high:
        return [0.0] * len(percents)
    return [(d - low) * (1 / (high - low)) for d in percents]
