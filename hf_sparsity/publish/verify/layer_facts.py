"""Facts of one layer's weights, as they are in a folder: zeros, groups, the mask, values on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...algorithm import Pattern
from ...core.masks import INTEGERS
from ...model.sparsity import mask_hash

GRID = 256  # values that 8 bits can have
ROWS = 16  # rows of each layer that are tested for a grid
_WINDOW = 128  # inputs that share a scale in most group-wise formats


@dataclass(frozen=True)
class LayerFacts:
    """Facts of one layer's weights.

    Attributes:
        zeros: number of weights that are zero.
        size: number of weights.
        width: weights in a row.
        mask: hash of the places of the zeros, see `mask_hash`.
        groups: groups of the N:M pattern; 0 if unstructured, or if the groups do not divide the width.
        crowded: groups that keep more weights than the pattern allows.
        on_grid: whether there are so few different values that they must have been rounded.
    """

    zeros: int
    size: int
    width: int
    mask: str
    groups: int
    crowded: int
    on_grid: bool

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero."""
        return self.zeros / self.size


def look(weight: Tensor, pattern: Pattern) -> LayerFacts:
    """Returns the facts of a weight `[out, in]` of any floating-point dtype, which should have this pattern."""
    groups, crowded = 0, 0
    if pattern.group is not None and pattern.kept is not None and weight.shape[1] % pattern.group == 0:
        kept = (weight != 0).reshape(-1, pattern.group).sum(1)
        groups, crowded = len(kept), int((kept > pattern.kept).sum())
    size = weight.numel()
    zeros = size - int(torch.count_nonzero(weight))
    return LayerFacts(zeros, size, weight.shape[1], mask_hash(weight), groups, crowded, is_on_grid(weight))


def is_on_grid(weight: Tensor) -> bool:
    """Returns whether a weight `[out, in]` has only few values: in all of it, in each row, or in 128 inputs of a row.

    A sample of rows is tested, and most of its parts must agree.
    """
    rows = weight[:: max(1, weight.shape[0] // ROWS)].contiguous()
    if rows.element_size() == 1:
        return True
    windows = [part for row in rows for part in row.split(_WINDOW)] if rows.shape[1] > _WINDOW else []
    return any(
        parts and sum(map(_few_values, parts)) > len(parts) / 2 for parts in ([rows], list(rows.unbind()), windows)
    )


def _few_values(part: Tensor) -> bool:
    """Returns whether there are at most 256 values, each twice on average, and under half of the dtype's in their range.

    The last condition is for bf16, which has only 128 magnitudes between a number and its double.
    """
    values = part[part != 0]
    if values.numel() < 32 or not torch.isfinite(values).all():
        return False
    different = values.unique()
    if len(different) > GRID or 2 * len(different) > len(values):
        return False
    sizes = different.abs()
    # As integers, neighbouring positive floats differ by one.
    low, high = (int(x.view(INTEGERS[x.element_size()])) for x in (sizes.min(), sizes.max()))
    return len(different) < high - low + 1  # half of both signs
