"""Magnitude pruning: the smallest weights go.

Han et al., NeurIPS 2015, https://arxiv.org/abs/1506.02626.
Checked against locuslab/wanda, `lib/prune.py`, `prune_magnitude`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Cells, Citation, Layer, Pruner
from ..core import masks


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Keeps the largest |W|: of the whole matrix (`compare="layer"`, as published) or of each row.

    Row sparsities and N:M patterns compare within rows and groups whatever `compare` says. Scores
    keep the weight's dtype, because the authors' ties in half precision depend on it.
    """

    compare: str = "layer"

    name = "magnitude"
    paper = "https://arxiv.org/abs/1506.02626"
    summary = "the smallest weights go, compared per layer or per row"
    citation = Citation(
        "han2015learning",
        "Learning both Weights and Connections for Efficient Neural Networks",
        "Song Han and Jeff Pool and John Tran and William J. Dally",
        2015,
        "1506.02626",
    )

    def __post_init__(self) -> None:
        if self.compare not in ("layer", "row"):
            raise ValueError(f"magnitude: compare={self.compare!r}; use 'layer' or 'row'")

    def scores(self, layer: Layer) -> Tensor:
        """|W|, `[out, in]`, in the weight's dtype."""
        return layer.weight.abs()

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """The base class' mask, or one threshold for the matrix; bool `[out, in]`."""
        if self.compare == "layer" and layer.rows is None and layer.pattern.group is None:
            return masks.keep_layer(scores, layer.sparsity)
        return super().mask(layer, scores)

    def compared_within(self, layer: Layer) -> Cells | None:
        """The whole layer, or the base class' rows and groups."""
        if self.compare == "layer" and layer.pattern.group is None:
            return Cells(layer.weight.shape[1], across_rows=True)
        return super().compared_within(layer)
