"""AlphaPruning: layerwise sparsity from the tails of the weights' eigenvalue densities.

Lu et al., NeurIPS 2024, https://arxiv.org/abs/2410.10912.
Checked against the authors' code, haiquanlu/AlphaPruning, lib/esd_utils.py and lib/prune.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..algorithm import Allocator, Citation, Layer, ModelOracle, Pruner
from ..core.power_law import check_choices, sparsities_by_exponent, tail_exponent
from ..core.spectra import spectra


@dataclass(frozen=True)
class AlphaPruning(Allocator):
    """Blocks whose weights have heavy-tailed spectra are well trained and keep more.

    The measure of a layer is the exponent alpha of a power law fitted to the largest eigenvalues of
    W^T W; no data is needed. Sparsity grows linearly with alpha. None where no law can be fitted;
    such a layer takes the mean of its block.
    """

    fit: str = "peak"  # where the tail starts: peak (published), mid, ks, peak_fixed; `core/power_law.py`
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer (mapping_type)
    spread: float = 0.3  # epsilon: before scaling to the target, sparsities span 1 - spread to 1 + spread
    floor: float = 0.0  # EVALS_THRESH: eigenvalues at or below are ignored; 1e-5 in the code, switched off

    name = "alphapruning"
    paper = "https://arxiv.org/abs/2410.10912"
    summary = "layers with heavier spectral tails keep more; looks at weights only"
    citation = Citation(
        "lu2024alphapruning",
        "{AlphaPruning}: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large "
        "Language Models",
        "Haiquan Lu and Yefan Zhou and Shiwei Liu and Zhangyang Wang and Michael W. Mahoney and Yaoqing Yang",
        2024,
        "2410.10912",
    )
    needs = frozenset()
    measure_label = "tail exponent alpha"
    only_in_assign = ("spread", "per")
    race_grid = {"spread": (0.1, 0.3), "per": ("block", "layer")}

    def __post_init__(self) -> None:
        check_choices(fit=self.fit, per=self.per, spread=self.spread, floor=self.floor)

    def measure(self, block: Mapping[str, Layer], pruner: Pruner | None = None) -> dict[str, Any]:
        """{layer: alpha, or None}. Weights are read as float32, as the authors do."""
        pools = spectra([layer.weight for layer in block.values()])
        alphas = (tail_exponent(pool, self.fit, floor=self.floor) for pool in pools)
        return dict(zip(block, alphas, strict=True))

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """The published values; one may exceed 1, which the caller clamps and makes up for elsewhere."""
        return sparsities_by_exponent(measures, sizes, target, spread=self.spread, per=self.per)
