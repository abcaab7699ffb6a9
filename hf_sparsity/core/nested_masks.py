"""The masks of a layer at all sparsities, in one byte a weight.

A mask is looked up, not computed, because masks are nested: a weight pruned at one sparsity is pruned at every higher
one. A `step` is a sparsity's number in the ascending list of those that a layer can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 256  # sparsities that one byte can tell apart
CHUNK = 1 << 24  # weights sorted at a time, which bounds memory (128 MiB of int64 places)


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


def row_levels(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns at how many of the ascending `counts` each weight survives when that many are pruned from every row.

    `scores`: `[rows, columns]`. Returns uint8 `[rows, columns]`; the sum of `masks.keep_rows(scores, c)`
    over `counts`, ties included, for the price of one sort.
    """
    width = scores.shape[1]
    edges = torch.tensor(counts, dtype=torch.int64, device=scores.device)
    places = torch.arange(width, device=scores.device)
    survives = torch.searchsorted(edges, places, right=True).to(torch.uint8)
    levels = torch.empty_like(scores, dtype=torch.uint8)
    rows = max(1, CHUNK // width)
    for part, out in zip(torch.split(scores, rows), torch.split(levels, rows), strict=True):
        out.scatter_(1, part.argsort(dim=1, stable=True), survives.expand(part.shape))
    return levels


def mask_levels(masks: Iterable[Tensor], like: Tensor) -> Tensor:
    """Returns in how many of at most 255 masks each weight is kept, uint8 of the shape and device of `like`."""
    levels = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
    for mask in masks:
        levels += mask
    return levels


def rank_cells(scores: Tensor, steps: int = STEPS) -> tuple[Tensor, tuple[int, ...]]:
    """Returns (`survives` uint8 `[cells, members]`, the zeros of a cell at each step) of scores compared within each row.

    `scores`: `[cells, members]`. `steps`: at most 256. Of equal scores the first is pruned first.
    """
    members = scores.shape[1]
    counts = tuple(round(members * step / steps) for step in range(steps))
    return row_levels(scores, counts[1:]), counts


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


def rank_masks(mask_at: Callable[[float], Tensor], scores: Tensor, steps: int = STEPS) -> Ranks:
    """Returns the masks of any pruner whose masks are nested; `mask_at(sparsity)` is called once a step.

    `scores`: of the layer, for the shape and the device of the masks.
    """
    return _counted(mask_levels((mask_at(step / steps) for step in range(1, steps)), scores), steps, 1)


def _counted(survives: Tensor, steps: int, cells: int) -> Ranks:
    zeros = torch.bincount(survives.reshape(-1).long(), minlength=steps).cumsum(0).tolist()
    return Ranks(survives, (0, *zeros[: steps - 1]), cells)
