"""The masks of a layer at all sparsities, in one byte a weight.

A mask is looked up, not computed, because masks are nested: a weight pruned at one sparsity is pruned at every higher
one. A `step` is a sparsity's number in the ascending list of those that a layer can take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 256  # sparsities that one byte can tell apart


@dataclass(frozen=True)
class Ranks:
    """The nested masks of one layer.

    `survives`: uint8 `[out, in]`, the highest step at which a weight is still kept. `zeros`: the number of weights
    pruned at step 0, 1, ...; `cells`: the number of groups of weights (rows, say) within which the pruner compares; all
    lose the same number.
    """

    survives: Tensor
    zeros: tuple[int, ...]
    cells: int

    def mask(self, step: int) -> Tensor:
        """Returns the mask of a step, bool `[out, in]`, True = kept."""
        return self.survives >= step

    @property
    def size(self) -> int:
        """Number of weights of the layer."""
        return self.survives.numel()


def rank_cells(scores: Tensor, steps: int = STEPS) -> tuple[Tensor, tuple[int, ...]]:
    """Returns (`survives` uint8 `[cells, members]`, the zeros of a cell at each step) of scores compared within each row.

    `scores`: `[cells, members]`. `steps`: at most 256. Of equal scores the first is pruned first.
    """
    members = scores.shape[1]
    counts = tuple(round(members * step / steps) for step in range(steps))
    order = scores.argsort(dim=1, stable=True)
    edges = torch.tensor(counts[1:], device=scores.device)
    reached = torch.searchsorted(edges, torch.arange(members, device=scores.device), right=True).to(torch.uint8)
    return torch.empty_like(order, dtype=torch.uint8).scatter_(1, order, reached.expand_as(order)), counts


def rank_rows(scores: Tensor, group: int | None = None) -> Ranks:
    """Returns the masks of a pruner that compares within rows, or within each `group` of consecutive columns."""
    width = group or scores.shape[1]
    survives, counts = rank_cells(scores.reshape(-1, width), min(width, STEPS))
    return Ranks(survives.reshape(scores.shape), tuple(c * len(survives) for c in counts), len(survives))


def rank_blocks(scores: Tensor, columns: int) -> Ranks:
    """Returns the masks of a pruner that compares all weights within each `columns` consecutive columns.

    A layer with fewer columns is compared as a whole.
    """
    parts = []
    pieces = scores.split(columns, dim=1)
    for piece in pieces:
        survives, _ = rank_cells(piece.reshape(1, -1))
        parts.append(survives.reshape(piece.shape))
    return _counted(torch.cat(parts, dim=1), STEPS, len(pieces))


def rank_masks(mask_at: Callable[[float], Tensor], shape: torch.Size, steps: int = STEPS) -> Ranks:
    """Returns the masks of any pruner whose masks are nested; `mask_at(sparsity)` is called once a step."""
    survives = torch.zeros(shape, dtype=torch.uint8)
    for step in range(1, steps):
        mask = mask_at(step / steps)
        survives = survives.to(mask.device) + mask
    return _counted(survives, steps, 1)


def _counted(survives: Tensor, steps: int, cells: int) -> Ranks:
    zeros = torch.bincount(survives.reshape(-1).long(), minlength=steps).cumsum(0).tolist()
    return Ranks(survives, (0, *zeros[: steps - 1]), cells)
