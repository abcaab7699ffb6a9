"""FARMS: AlphaPruning's measure, freed of the bias that a layer's shape puts on its spectrum.

Hu et al., ICML 2025, https://arxiv.org/abs/2506.06280.
Checked against the authors' code, HUST-AI-HYZ/FARMS, LLM_Pruning/lib (sampling.py, esd_utils_farms.py, prune.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..algorithm import Allocator, Citation, Layer, ModelOracle, Pruner
from ..core.power_law import check_choices, sparsities_by_exponent, tail_exponent
from ..core.spectra import sliding, spectra
from ..validation import check_number


@dataclass(frozen=True)
class FARMS(Allocator):
    """Fixed-aspect-ratio windows of every layer make spectra of differently shaped layers comparable.

    The eigenvalues of all windows of a layer are pooled and one tail exponent is fitted to the pool;
    then as AlphaPruning. Ratios above 1, which the authors' code sets to 0.998 (0.99999 at exactly
    0.7) and thereby misses the target, are left to the caller, who clamps and meets the target.
    """

    rows: int = 2000  # num_row_samples: height of a window, at most what fits
    ratio: float = 1.0  # Q: width of a window / its height
    ops: int = 15  # sampling_ops_per_dim: windows per dimension
    fit: str = "peak"  # where the tail starts: peak (published), mid, ks, peak_fixed; `core/power_law.py`
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer
    spread: float = 0.3  # epsilon: before scaling to the target, sparsities span 1 - spread to 1 + spread
    floor: float = 0.0  # EVALS_THRESH: eigenvalues at or below are ignored; 1e-5 in the code, switched off

    name = "farms"
    paper = "https://arxiv.org/abs/2506.06280"
    summary = "the same as `alphapruning`, spectra pooled over windows of one aspect ratio"
    citation = Citation(
        "hu2025eigenspectrum",
        "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias",
        "Yuanzhe Hu and Kinshuk Goel and Vlad Killiakov and Yaoqing Yang",
        2025,
        "2506.06280",
    )
    needs = frozenset()
    measure_label = "tail exponent alpha"
    only_in_assign = ("spread", "per")
    race_grid = {"spread": (0.1, 0.3), "per": ("block", "layer")}

    def __post_init__(self) -> None:
        check_choices(fit=self.fit, per=self.per, spread=self.spread, floor=self.floor)
        check_number("farms: rows", self.rows, "[1, inf)", whole=True)
        check_number("farms: ops", self.ops, "[1, inf)", whole=True)
        check_number("farms: ratio", self.ratio, "(0, inf)", hint=": the columns of a window per row")

    def measure(self, block: Mapping[str, Layer], pruner: Pruner | None = None) -> dict[str, Any]:
        """{layer: alpha of its pooled windows, or None}. Weights are read as float32, as the authors do."""
        cut = partial(sliding, height=self.rows, ratio=self.ratio, steps=self.ops)
        pools = spectra([layer.weight for layer in block.values()], cut)
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
        """The published values before their clamp; one may exceed 1."""
        return sparsities_by_exponent(measures, sizes, target, spread=self.spread, per=self.per)
