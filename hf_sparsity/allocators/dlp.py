"""DLP: dynamic layerwise pruning.

Chen et al., ICML 2025, https://arxiv.org/abs/2505.23807.
Checked against the authors' code, ironartisan/DLP, lib/prune.py (get_dlp_ratios), and their released ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..algorithm import NORMS, Allocator, Citation, Layer, ModelOracle, Pruner
from ..core.allocation import check_per, check_spread, rising_with_measure
from ..core.median import median

STATISTICS = ("mean", "median")


@dataclass(frozen=True)
class DLP(Allocator):
    """Blocks whose weights score high on average count as redundant, and lose more.

    The measure of a block is the mean or median u of its Wanda scores `|W_ij| * norm(x_j)`, whatever the pruner; its
    importance is `1 - u / sum(u)`. As activations grow with depth, the late blocks become the sparse ones.

    The paper says median. The released code has a switch for it that nothing reads, and takes the mean, as the default
    does here. The authors' runs have a `spread` of 0.15, at 70 %. `per="layer"` (not theirs) treats layers as blocks.

    Deliberate differences: double precision after the scores; equal statistics give uniform (the authors' code
    divides by zero); with `*:M` sparsities are rounded as for any allocator, not by the authors' own formula.
    """

    statistic: str = "mean"
    spread: float | None = None  # alpha: sparsities span 2 * spread. None: by the target, see core/allocation.py
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer

    name = "dlp"
    paper = "https://arxiv.org/abs/2505.23807"
    summary = "blocks whose weights score high on average lose more"
    citation = Citation(
        "chen2025dlp",
        "{DLP}: Dynamic Layerwise Pruning in Large Language Models",
        "Yuli Chen and Bo Cheng and Jiale Han and Yingying Zhang and Yingting Li and Shuhao Zhang",
        2025,
        "2505.23807",
    )
    needs = frozenset({NORMS})
    measure_label = "typical score of a weight"
    only_in_assign = ("spread",)
    race_grid = {"statistic": ("mean", "median"), "spread": (0.05, 0.15)}

    def __post_init__(self) -> None:
        check_per(self.per)
        if self.statistic not in STATISTICS:
            raise ValueError(f"dlp: statistic={self.statistic!r} is unknown; use {' or '.join(map(repr, STATISTICS))}")
        check_spread(self.name, self.spread)

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """Returns the statistic of the block's scores, the same for each of its layers; or each layer's own."""
        if not block:
            return {}
        if self.per == "layer":
            return {name: self._statistic([layer]) for name, layer in block.items()}
        return dict.fromkeys(block, self._statistic(list(block.values())))

    def _statistic(self, layers: Sequence[Layer]) -> float:
        if self.statistic == "median":
            return median(lambda: (layer.norm_scores(self.name) for layer in layers))
        total = sum(float(layer.norm_scores(self.name).double().sum()) for layer in layers)
        return total / sum(layer.weight.numel() for layer in layers)

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """The published mapping, its mean unweighted by size; a sparsity of 0 or less becomes 0.01."""
        # `1 - u / sum(u)` is linear in u, and what follows sees no more than the order and the distances.
        return rising_with_measure(measures, self.per, target, self.spread)
