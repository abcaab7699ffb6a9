"""Sparsities that meet the global target exactly, counted in weights."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HIGHEST = 0.998  # sparsity of a layer at most, so that none is emptied (the cap of HUST-AI-HYZ/FARMS, ratios above 1)
TOLERANCE = 1e-6  # difference from the target up to which a published formula is left as it is


def mean_sparsity(sparsities: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Returns the sparsity of the whole: the mean weighted by `sizes` (weights per layer)."""
    total = math.fsum(sizes[name] for name in sparsities)
    return math.fsum(s * sizes[name] for name, s in sparsities.items()) / total


def meet(
    sparsities: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    *,
    low: float = 0.0,
    high: float = HIGHEST,
) -> dict[str, float]:
    """Returns sparsities clamped to `[low, high]` and shifted together until the weighted mean equals `target`.

    Values that already fit are returned unchanged (to the bit), so a formula keeps its published
    result. NaN anywhere (constant measures) gives `target` to all. `high` rises to `target` where needed.
    """
    high = max(high, target)
    low = min(low, target)
    if any(math.isnan(s) for s in sparsities.values()):
        return dict.fromkeys(sparsities, target)
    fits = all(low <= s <= high for s in sparsities.values())
    if fits and abs(mean_sparsity(sparsities, sizes) - target) <= TOLERANCE:
        return dict(sparsities)

    def shifted(by: float) -> dict[str, float]:
        return {name: min(max(s + by, low), high) for name, s in sparsities.items()}

    # The clamped mean grows with the shift, so bisect it; 200 halvings exhaust double precision.
    sparsities = {n: min(max(s, low - 2), high + 2) for n, s in sparsities.items()}
    below, above = -4.0 - high, 4.0 + high
    for _ in range(200):
        middle = (below + above) / 2
        if mean_sparsity(shifted(middle), sizes) < target:
            below = middle
        else:
            above = middle
    return shifted(above)


def meet_groups(
    sparsities: Mapping[str, float], sizes: Mapping[str, int], target: float, group: int
) -> dict[str, float]:
    """Returns sparsities rounded to multiples of `1 / group` (`*:M`), as close to `target` as whole layers allow.

    The weighted mean is never below the target.

    Each layer keeps `n` of `group`, 1 <= n <= group. Rounds half to even (OWL's N:M), then moves the
    layers whose rounding moved them furthest, one step each at a time, until no more weights are
    kept than the target allows and no further layer fits. Already exact values are unchanged.
    """
    ideal = {name: (1 - s) * group for name, s in sparsities.items()}
    kept = {name: min(max(round(k), 1), group) for name, k in ideal.items()}
    # In units of weights / group, so that everything is an integer but the target itself.
    budget = math.floor((1 - target) * group * sum(sizes[name] for name in kept) + 1e-6)
    used = sum(kept[name] * sizes[name] for name in kept)
    order = {name: i for i, name in enumerate(sorted(kept, reverse=True))}

    def queue(step: int) -> list[tuple[float, int, int, str]]:
        heap = [entry(name, step) for name in kept]
        heapq.heapify(heap)
        return heap

    def entry(name: str, step: int) -> tuple[float, int, int, str]:
        """Returns a sort key: first the layer furthest on the wrong side of its ideal, then the larger, then the later name."""
        return step * (kept[name] - ideal[name]), -sizes[name], order[name], name

    heap = queue(-1)
    while used > budget and heap:
        name = heapq.heappop(heap)[-1]
        if kept[name] > 1:
            kept[name] -= 1
            used -= sizes[name]
            heapq.heappush(heap, entry(name, -1))
    heap = queue(1)
    while heap:
        name = heapq.heappop(heap)[-1]
        # What does not fit now never will: the room only shrinks.
        if kept[name] < group and sizes[name] <= budget - used:
            kept[name] += 1
            used += sizes[name]
            heapq.heappush(heap, entry(name, 1))
    return {name: 1 - n / group for name, n in kept.items()}


@dataclass(frozen=True)
class Curve:
    """A block's redundancy as a function of its sparsity: straight lines between the points of a table.

    `sparsity`: ascending, from 0 on; `redundancy`: at each of them.
    """

    sparsity: Sequence[float]
    redundancy: Sequence[float]

    def at(self, s: float) -> float:
        """Returns the redundancy at sparsity `s`; beyond the last point, that point's."""
        i = bisect_right(self.sparsity, s)
        if i == len(self.sparsity):
            return self.redundancy[-1]
        part = (s - self.sparsity[i - 1]) / (self.sparsity[i] - self.sparsity[i - 1])
        return self.redundancy[i - 1] + part * (self.redundancy[i] - self.redundancy[i - 1])

    def reach(self, level: float, floor: float, cap: float) -> float:
        """Returns the smallest sparsity in `[floor, cap]` with at most this redundancy, or `cap` where there is none."""
        s, now = floor, self.at(floor)
        if now <= level:
            return floor
        for p in [*(p for p in self.sparsity if floor < p < cap), cap]:
            after = self.at(p)
            if after <= level:
                return s + (p - s) * (now - level) / (now - after)
            s, now = p, after
        return cap


def fill(
    curves: Sequence[Curve], sizes: Sequence[int], target: float, *, floor: Sequence[float], cap: float
) -> list[float]:
    """Returns sparsities by water-filling: one redundancy for all blocks, `floor <= s <= cap`, weighted mean `target`.

    Redundancies lie in [0, 1]. Where a block's redundancy jumps past the level or never reaches it, the
    solutions on both sides are blended, so that the target is met exactly.
    """

    def at(level: float) -> list[float]:
        return [curve.reach(level, low, cap) for curve, low in zip(curves, floor, strict=True)]

    def excess(sparsities: Sequence[float]) -> float:
        return math.fsum(n * (s - target) for n, s in zip(sizes, sparsities, strict=True))

    below, above = -1.0, 2.0  # at -1 every block is at the cap, at 2 at its floor
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (below, middle) if excess(at(middle)) < 0 else (middle, above)
    most, least = at(below), at(above)
    over, under = excess(most), excess(least)
    share = 0.0 if over == under else under / (under - over)
    return [low + share * (high - low) for high, low in zip(most, least, strict=True)]
