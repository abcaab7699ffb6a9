"""One byte a weight holds the masks of a layer at all sparsities; a point of the grid is a sparsity for each layer.

A mask is looked up, not computed, because masks are nested: what goes at one sparsity goes at every higher one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

STEPS = 256  # of one byte
ROOM = 1e-6  # of one weight of a row: keeps truncation from taking a weight less than a point says

Point = tuple[int, ...]  # the step of each layer


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


@dataclass(frozen=True)
class Grid:
    """The points of equal weight budget: how many weights go at each step of each layer.

    All points take at least `mass` weights, and more by less than any layer's step: as many as the pruner takes at
    the uniform `target`, which truncates in each of its `cells`; in groups of `group`, the target's own number.
    """

    zeros: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    cells: Mapping[str, int]
    target: float
    group: int | None = None

    @cached_property
    def names(self) -> list[str]:
        """The layers, in the order of a point."""
        return list(self.sizes)

    @cached_property
    def mass(self) -> int:
        """The weights that every point takes."""
        if self.group:
            return math.ceil(self.target * sum(self.sizes.values()) - 1e-6)
        return sum(self.cells[n] * int(self.sizes[n] / self.cells[n] * self.target) for n in self.names)

    def taken(self, point: Point) -> int:
        """Weights that a point takes."""
        return sum(self.zeros[name][step] for name, step in zip(self.names, point, strict=True))

    def nearest(self, sparsities: Mapping[str, float]) -> Point:
        """The point closest to these sparsities within the budget.

        Each layer takes its nearest step; then the layers whose rounding moved them furthest give way, one step each
        at a time, until the budget is met and no layer can keep more.
        """
        ideal = [sparsities[name] * self.sizes[name] for name in self.names]
        tables = [self.zeros[name] for name in self.names]
        point = [_closest(table, want) for table, want in zip(tables, ideal, strict=True)]
        taken = self.taken(tuple(point))

        def off(i: int, by: int) -> float:
            """How far layer i would be beyond its ideal after `by` more steps, as a share of its weights."""
            return by * (tables[i][point[i] + by] - ideal[i]) / self.sizes[self.names[i]]

        heap = [(off(i, 1), i) for i, k in enumerate(point) if k + 1 < len(tables[i])]
        heapify(heap)
        while taken < self.mass and heap:
            i = heappop(heap)[1]
            taken += tables[i][point[i] + 1] - tables[i][point[i]]
            point[i] += 1
            if point[i] + 1 < len(tables[i]):
                heappush(heap, (off(i, 1), i))
        heap = [(off(i, -1), i) for i, k in enumerate(point) if k]
        heapify(heap)
        while heap:
            i = heappop(heap)[1]
            step = tables[i][point[i]] - tables[i][point[i] - 1]
            if step <= taken - self.mass:  # what is too much now will always be: the room only shrinks
                taken -= step
                point[i] -= 1
                if point[i]:
                    heappush(heap, (off(i, -1), i))
        return tuple(point)

    def fractions(self, point: Point) -> dict[str, float]:
        """The share of each layer that a point takes."""
        return {name: self.zeros[name][k] / self.sizes[name] for name, k in zip(self.names, point, strict=True)}

    def sparsities(self, point: Point) -> dict[str, float]:
        """Sparsities for a plan at which the pruner takes what the point says, and whose weighted mean is the target.

        What truncation takes from the target is given back evenly as parts of a weight of each cell; what cannot be
        is left to the largest layer.
        """
        found = self.fractions(point)
        if self.group:
            return found
        left = self.target * sum(self.sizes.values()) - self.taken(point)
        part = min(max(left / sum(self.cells.values()), ROOM), 1 - ROOM)
        found = {name: s + part * self.cells[name] / self.sizes[name] if s else 0.0 for name, s in found.items()}
        left = self.target * sum(self.sizes.values()) - math.fsum(s * self.sizes[n] for n, s in found.items())
        largest = max(self.names, key=lambda name: self.sizes[name])
        return found | {largest: found[largest] + left / self.sizes[largest]}


def _closest(table: Sequence[int], want: float) -> int:
    after = min(bisect_left(table, want), len(table) - 1)
    return after - 1 if after and want - table[after - 1] <= table[after] - want else after
