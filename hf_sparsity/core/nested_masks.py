"""One byte a weight holds the masks of a layer at all sparsities; a point of the grid is a sparsity for each layer.

A mask is looked up, not computed, because masks are nested: what goes at one sparsity goes at every higher one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 256  # of one byte


@dataclass(frozen=True)
class Ranks:
    """The nested masks of one layer.

    `survives`: uint8 `[out, in]`, the highest step at which a weight is still kept. `zeros`: how many weights go at
    step 0, 1, ...; `cells`: among how many groups of weights (rows, say) the pruner compares, each losing equally many.
    """

    survives: Tensor
    zeros: tuple[int, ...]
    cells: int

    def mask(self, step: int) -> Tensor:
        """Bool `[out, in]`, True = kept."""
        return self.survives >= step

    @property
    def size(self) -> int:
        """Weights of the layer."""
        return self.survives.numel()


def rank_cells(scores: Tensor, steps: int = STEPS) -> tuple[Tensor, tuple[int, ...]]:
    """Scores compared within each row of `[cells, members]` -> (`survives` uint8, the zeros of a cell at each step).

    `steps` at most 256. Ties: the first goes first.
    """
    members = scores.shape[1]
    counts = tuple(round(members * step / steps) for step in range(steps))
    order = scores.argsort(dim=1, stable=True)
    edges = torch.tensor(counts[1:], device=scores.device)
    reached = torch.searchsorted(edges, torch.arange(members, device=scores.device), right=True).to(torch.uint8)
    return torch.empty_like(order, dtype=torch.uint8).scatter_(1, order, reached.expand_as(order)), counts


def rank_rows(scores: Tensor, group: int | None = None) -> Ranks:
    """For a pruner that compares within rows, or within each `group` of consecutive columns."""
    width = group or scores.shape[1]
    survives, counts = rank_cells(scores.reshape(-1, width), min(width, STEPS))
    return Ranks(survives.reshape(scores.shape), tuple(c * len(survives) for c in counts), len(survives))


def rank_blocks(scores: Tensor, columns: int) -> Ranks:
    """For a pruner that compares all weights of each `columns` consecutive columns; of the whole layer if there are fewer."""
    parts = []
    pieces = scores.split(columns, dim=1)
    for piece in pieces:
        survives, _ = rank_cells(piece.reshape(1, -1))
        parts.append(survives.reshape(piece.shape))
    return _counted(torch.cat(parts, dim=1), STEPS, len(pieces))


def rank_masks(mask_at: Callable[[float], Tensor], shape: torch.Size, steps: int = STEPS) -> Ranks:
    """For any pruner whose masks are nested: `mask_at(sparsity)` is asked once a step."""
    survives = torch.zeros(shape, dtype=torch.uint8)
    for step in range(1, steps):
        mask = mask_at(step / steps)
        survives = survives.to(mask.device) + mask
    return _counted(survives, steps, 1)


def _counted(survives: Tensor, steps: int, cells: int) -> Ranks:
    found = torch.bincount(survives.reshape(-1).long(), minlength=steps).cumsum(0).tolist()
    return Ranks(survives, (0, *found[: steps - 1]), cells)
