"""Plans on a grid: a step for each layer that meets the budget exactly."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

ROOM = 1e-6  # of one weight of a row: keeps truncation from taking a weight less than a point says


Point = tuple[int, ...]  # the step of each layer


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
