"""What is done to a layer's weights between its pruner and the model: exchanges of weights, and a refit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Layer
from ..core.least_squares import refit
from ..core.swaps import swap


@dataclass(frozen=True)
class Refinement:
    """Improves pruned weights on the Gram matrix of their inputs, by what `SparsityConfig.refit` and `refine` ask for."""

    refit: bool = False
    swaps: bool = False

    def __call__(self, layer: Layer, pruned: Tensor) -> Tensor:
        """Returns the better weights `[out, in]`; `pruned` as it is where nothing is asked for, or known of the inputs."""
        if not self.refit or layer.stats is None or layer.stats.is_flat or layer.stats.gram is None:
            return pruned
        if self.swaps:
            pruned = swap(layer.weight, pruned, layer.stats.gram, group=layer.pattern.group)
        return refit(layer.weight, pruned, layer.stats.gram)[0]
