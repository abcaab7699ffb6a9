"""What the weights of one layer are like, as they are in a folder: zeros, groups, the mask, values on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...algorithm import Pattern
from ...core.masks import INTEGERS
from ...model.sparsity import mask_hash

GRID = 256  # 8 bits have no more values
ROWS = 16  # looked at per layer
_WINDOW = 128  # inputs that share a scale in most group-wise formats


@dataclass(frozen=True)
class LayerFacts:
    """What a look at one layer's weights tells: `size` weights in rows of `width`, of which `zeros` are zero; `mask` is the hash of their places.

    `crowded`: groups of the pattern with more weights than it keeps, of `groups` (0: unstructured, or a width that the
    groups do not divide). `on_grid`: the values are so few that they must have been rounded.
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
        """Fraction of the weights that are zero."""
        return self.zeros / self.size


def look(weight: Tensor, pattern: Pattern) -> LayerFacts:
    """The facts of a weight `[out, in]` of any floating-point dtype that is to have this pattern."""
    groups, crowded = 0, 0
    if pattern.group is not None and pattern.kept is not None and weight.shape[1] % pattern.group == 0:
        kept = (weight != 0).reshape(-1, pattern.group).sum(1)
        groups, crowded = len(kept), int((kept > pattern.kept).sum())
    size = weight.numel()
    zeros = size - int(torch.count_nonzero(weight))
    return LayerFacts(zeros, size, weight.shape[1], mask_hash(weight), groups, crowded, is_on_grid(weight))


def is_on_grid(weight: Tensor) -> bool:
    """Returns whether the values of a weight `[out, in]` were rounded to few: over all of it, by row, or by 128 inputs.

    A sample of rows is looked at, and most of its parts must agree.
    """
    rows = weight[:: max(1, weight.shape[0] // ROWS)].contiguous()
    if rows.element_size() == 1:
        return True
    windows = [part for row in rows for part in row.split(_WINDOW)] if rows.shape[1] > _WINDOW else []
    return any(
        parts and sum(map(_few_values, parts)) > len(parts) / 2 for parts in ([rows], list(rows.unbind()), windows)
    )


def _few_values(part: Tensor) -> bool:
    """Returns whether there are at most 256 values, each taken twice on average, and under half of those that the dtype has in their range.

    The last condition is for bf16, which has only 128 magnitudes between a number and its double.
    """
    values = part[part != 0]
    if values.numel() < 32 or not torch.isfinite(values).all():
        return False
    found = values.unique()
    if len(found) > GRID or 2 * len(found) > len(values):
        return False
    sizes = found.abs()
    # As integers, neighbouring positive floats differ by one.
    low, high = (int(x.view(INTEGERS[x.element_size()])) for x in (sizes.min(), sizes.max()))
    return len(found) < high - low + 1  # half of both signs
