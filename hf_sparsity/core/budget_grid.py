"""Plans on a grid: a step for each layer, all of them together meeting the weight budget exactly."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

ROOM = 1e-6  # weights of a row: added so that truncation does not prune one weight fewer than a point says


Point = tuple[int, ...]  # the step of each layer


@dataclass(frozen=True)
class Grid:
    """The points that prune the same number of weights.

    Every point prunes at least `mass` weights, and more than that by less than any layer's step. `mass` is what the
    pruner prunes at the uniform `target`, where it truncates in each of its cells; with an N:M pattern of `group`
    columns it is exactly the target's share.

    `zeros`: weights that each layer loses at step 0, 1, ...; `sizes`, `cells`: see `Ranks`.
    """

    zeros: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    cells: Mapping[str, int]
    target: float
    group: int | None = None

    @cached_property
    def names(self) -> list[str]:
        """Names of the layers, in the order of a point."""
        return list(self.sizes)

    @cached_property
    def mass(self) -> int:
        """The number of weights that every point prunes at least."""
        if self.group:
            return math.ceil(self.target * sum(self.sizes.values()) - 1e-6)
        return sum(self.cells[n] * int(self.sizes[n] / self.cells[n] * self.target) for n in self.names)

    def taken(self, point: Point) -> int:
        """Returns the number of weights that a point prunes."""
        return sum(self.zeros[name][step] for name, step in zip(self.names, point, strict=True))

    def nearest(self, sparsities: Mapping[str, float]) -> Point:
        """Returns the point closest to these sparsities within the budget.

        Each layer takes its nearest step; then the layers whose rounding moved them furthest are moved back, one step
        each at a time, until the budget is met and no layer can keep more.
        """
        ideal = [sparsities[name] * self.sizes[name] for name in self.names]
        tables = [self.zeros[name] for name in self.names]
        point = [_closest(table, want) for table, want in zip(tables, ideal, strict=True)]
        taken = self.taken(tuple(point))

        def off(i: int, by: int) -> float:
            """Returns how far layer i would be beyond its ideal after `by` more steps, as a share of its weights."""
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
        """Returns the share of each layer that a point prunes."""
        return {name: self.zeros[name][k] / self.sizes[name] for name, k in zip(self.names, point, strict=True)}

    def sparsities(self, point: Point) -> dict[str, float]:
        """Returns sparsities at which the pruner prunes what the point says, and whose weighted mean is the target.

        What is missing from the target because the pruner truncates is spread evenly, as parts of one weight of each
        cell; a rest is given to the largest layer.
        """
        sparsities = self.fractions(point)
        if self.group:
            return sparsities
        left = self.target * sum(self.sizes.values()) - self.taken(point)
        part = min(max(left / sum(self.cells.values()), ROOM), 1 - ROOM)
        sparsities = {
            name: s + part * self.cells[name] / self.sizes[name] if s else 0.0 for name, s in sparsities.items()
        }
        left = self.target * sum(self.sizes.values()) - math.fsum(s * self.sizes[n] for n, s in sparsities.items())
        largest = max(self.names, key=lambda name: self.sizes[name])
        return sparsities | {largest: sparsities[largest] + left / self.sizes[largest]}


def _closest(table: Sequence[int], want: float) -> int:
    """Returns the index of the entry of an ascending table that is nearest to `want`, the lower of two."""
    after = min(bisect_left(table, want), len(table) - 1)
    return after - 1 if after and want - table[after - 1] <= table[after] - want else after
