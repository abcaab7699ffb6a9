"""RIA: relative importance and activations.

Zhang et al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF.
Checked against values of the authors' code; its channel permutation is not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import NORMS, Cells, Layer, Pruner
from ..core import masks
from ..validation import check_number


@dataclass(frozen=True)
class RIA(Pruner):
    """Keeps weights that are large among those of their input and of their output, times a power of the input's norm.

    `compare="row"`: the lowest scores of each row go. `"layer"`, the authors' default: one threshold for the matrix.
    """

    power: float = 0.5  # a in the paper: exponent of the input norm
    compare: str = "row"

    name = "ria"
    paper = "https://openreview.net/forum?id=Tr0lPx9woF"
    summary = "the smallest shares of their row and column go, weighted by the input norm's root"
    needs = frozenset({NORMS})

    def __post_init__(self) -> None:
        if self.compare not in ("layer", "row"):
            raise ValueError(f"ria: compare is {self.compare!r}; it must be 'row' or 'layer'")
        check_number("ria: power", self.power, "[0, inf)", hint=", such as 0.5")

    def scores(self, layer: Layer) -> Tensor:
        """`(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * norm(x_j)^power`, 0/0 being 0; float32 `[out, in]`."""
        if layer.stats is None:
            raise ValueError(f"{layer.name}: {self.name} needs the norms of the layer's inputs: give calibration data")
        size = layer.weight.abs().to(layer.stats.norms)
        if layer.stats.is_flat:  # nothing is known of the inputs: magnitude decides, as with other pruners
            return size
        share = (size / size.sum(0)).nan_to_num_(0) + (size / size.sum(1, keepdim=True)).nan_to_num_(0)
        return share * layer.stats.norms**self.power

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """The base class' mask, or with `compare="layer"` one threshold as magnitude's; bool `[out, in]`, True = kept."""
        if self.compare == "layer" and layer.pattern.group is None and layer.rows is None:
            return masks.keep_layer(scores, layer.sparsity)
        return super().mask(layer, scores)

    def compared_within(self, layer: Layer) -> Cells | None:
        """Rows and groups as in the base class, or the whole matrix."""
        if self.compare == "layer" and layer.pattern.group is None:
            return Cells(layer.weight.shape[1], across_rows=True)
        return super().compared_within(layer)
