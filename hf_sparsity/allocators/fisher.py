"""Fisher: the sensitivities from which MSP starts its search, used directly.

The measure is that of MSP, Xu et al., https://arxiv.org/abs/2503.11164; without the search, the mapping is
**reconstructed** from its first population, and not a method of that paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..algorithm import FISHER, Allocator, Citation, Layer, ModelOracle, Pruner
from ..core.allocation import check_per, floored, standard_logs
from ..validation import check_number


@dataclass(frozen=True)
class Fisher(Allocator):
    """Blocks to whose weights the loss is most sensitive keep more: `target - spread * z(log F)`, z in standard deviations.

    F is the trace of the empirical Fisher information, of a block the sum over its layers. One backward pass over
    the calibration data and no search. Equal traces give uniform; a layer that received no gradient counts as the
    least of the others.
    """

    spread: float = 0.1  # per standard deviation; 0.8 of 8 levels, the middle of what MSP starts from
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer

    name = "fisher"
    paper = "https://arxiv.org/abs/2503.11164"
    summary = "blocks to which the loss is most sensitive keep more: MSP's measure without its search"
    citation = Citation(
        "xu2025towards",
        "Towards Extreme Pruning of {LLMs} with Plug-and-Play Mixed Sparsity",
        "Chi Xu and Gefei Zhang and Yantong Zhu and Luca Benini and Guosheng Hu and Yawei Li and Zhihong Zhang",
        2025,
        "2503.11164",
    )
    needs = frozenset({FISHER})
    measure_label = "Fisher information"
    only_in_assign = ("spread", "per")
    race_grid = {"spread": (0.05, 0.1), "per": ("block", "layer")}

    def __post_init__(self) -> None:
        check_per(self.per)
        check_number("fisher: spread", self.spread, "[0, 1)")

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """Returns each layer's trace: the mean over sequences of the squared norm of the loss' gradient."""
        return {name: layer.trace(self.name) for name, layer in block.items()}

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """Returns the formula's values; the caller clamps those outside [0, 1) and makes up for them elsewhere."""
        parts = [list(block) for block in measures if block]
        if self.per == "layer":
            parts = [[name] for names in parts for name in names]
        traces = {name: float(value) for block in measures for name, value in block.items()}
        z = standard_logs(floored([math.fsum(traces[name] for name in names) for names in parts]))
        return {name: target - self.spread * z_ for names, z_ in zip(parts, z, strict=True) for name in names}
