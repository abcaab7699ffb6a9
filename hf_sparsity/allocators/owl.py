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

from ..algorithm import NORMS, Allocator, Citation, Layer, ModelOracle, Pruner
from ..core.allocation import check_per, groups_by_block_or_layer, linear_sparsities, normalized
from ..core.outliers import outlier_percent
from ..validation import check_number


@dataclass(frozen=True)
class OWL(Allocator):
    """Blocks with more outliers keep more weights.

    A weight is an outlier when its Wanda score `|W_ij| * norm(x_j)` exceeds `outlier` times the mean score of
    its block, whatever the pruner. No block strays more than `2 * spread` from another; with the pattern `*:M`
    the numbers pruned of M differ by at most `group_spread`. `per="layer"` (not published) does the same with
    layers in the place of blocks: each one's outliers are those above `outlier` times its own mean.

    Deliberate differences: equal outlier ratios give uniform (the authors' code divides by zero), and with
    `*:M` at least one weight of M is kept.
    """

    outlier: float = 5.0  # M in the paper
    spread: float = 0.08  # lambda in the paper
    group_spread: float = 2.0  # lambda of the authors' N:M runs, in weights of a group
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer

    name = "owl"
    paper = "https://arxiv.org/abs/2310.05175"
    summary = "blocks with more outliers keep more"
    citation = Citation(
        "yin2023outlier",
        "Outlier Weighed Layerwise Sparsity ({OWL}): A Missing Secret Sauce for Pruning {LLMs} to High Sparsity",
        "Lu Yin and You Wu and Zhenyu Zhang and Cheng-Yu Hsieh and Yaqing Wang and Yiling Jia and Gen Li and Ajay "
        "Jaiswal and Mykola Pechenizkiy and Yi Liang and Michael Bendersky and Zhangyang Wang and Shiwei Liu",
        2023,
        "2310.05175",
    )
    needs = frozenset({NORMS})
    returns_group_multiples = True
    measure_label = "outlier ratio (% of weights)"
    only_in_assign = ("spread", "group_spread")
    race_grid = {"outlier": (5.0, 7.0), "spread": (0.05, 0.08, 0.15)}

    def __post_init__(self) -> None:
        check_per(self.per)
        check_number("owl: outlier", self.outlier, "[0, inf)")
        check_number("owl: spread", self.spread)
        check_number("owl: group_spread", self.group_spread)

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """The block's outliers in percent of its weights, D, the same for each of its layers; or each layer's own."""
        if not block:
            return {}
        if self.per == "layer":
            return {
                name: outlier_percent([layer.norm_scores(self.name)], layer.weight.numel(), self.outlier)
                for name, layer in block.items()
            }
        count = sum(layer.weight.numel() for layer in block.values())
        percent = outlier_percent((layer.norm_scores(self.name) for layer in block.values()), count, self.outlier)
        return dict.fromkeys(block, percent)

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """The published mapping: the same sparsity for all layers of a block (or each its own).

        The mean that is held is the one over blocks, unweighted by size. A sparsity of 0 or less becomes 0.01;
        there is no cap. `*:M`: the authors' "structure" variant, rounded half to even.
        """
        parts = groups_by_block_or_layer(measures, self.per)
        percents = [percent for _, percent in parts]
        if group is None:
            sparsities = linear_sparsities(percents, target, self.spread)
        else:
            share = normalized(percents)
            mean = math.fsum(self.group_spread * u for u in share) / max(len(share), 1)
            pruned = [round(target * group) - round(self.group_spread * u - mean) for u in share]
            sparsities = [min(max(n, 0), group - 1) / group for n in pruned]
        return {name: s for (names, _), s in zip(parts, sparsities, strict=True) for name in names}
