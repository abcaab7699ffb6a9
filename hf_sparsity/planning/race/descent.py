"""Descent from a plan: sparsity moves from the layers where pruning a weight costs most to those where it costs least.

At the best plan of a budget all layers have the same slope. A step follows the slopes on a piece of text, averaged with
those before, and tries several lengths and shapes that keep the budget. The best of them on the next piece is taken if
it is better than the current plan; otherwise the next steps are shorter and use twice the text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...allocators.race import Race
from ...core.budget_grid import Point
from ...streaming.gradients import BlocksNotAlone
from .evaluator import Evaluator
from .sensitivity import PASSES

logger = logging.getLogger(__name__)

FIRST, LONGEST, SHORTEST = 0.08, 0.2, 0.004  # sparsity: the largest change of a layer in a step
LENGTHS = (2.0, 1.0, 0.5)  # multiples of the current length that a step tries
SHAPES = (0.5, 2.0)  # mean change / length: below 1 changes are proportional to the slopes, above 1 nearly equal
MEMORY = 0.5  # weight of the earlier slopes in the average
INTERRUPTED = "interrupted"  # reason for stopping, after which a search does not start


@dataclass
class Descent:
    """The course of a descent; `points` has all points it reached, the start first."""

    points: list[Point]
    steps: int = 0
    stopped: str = ""
    text: int = 1  # pieces of text that a step uses
    length: float = FIRST
    slopes: list[float] = field(default_factory=list)  # of each group, averaged over the steps

    @property
    def point(self) -> Point:
        """The point the descent has reached."""
        return self.points[-1]

    def to_dict(self) -> dict[str, Any]:
        """Returns what a plan records."""
        return {"steps": self.steps, "gains": len(self.points) - 1, "stopped": self.stopped}


def descend(race: Race, evaluator: Evaluator, start: Point, groups: Sequence[Sequence[str]]) -> Descent:
    """Takes up to `race.descent` steps from `start`; stops early when no step helps, or the budget is spent.

    A model whose blocks cannot be computed one by one has no slopes: the descent ends where it starts, with a warning.

    Args:
        groups: the layers that move together, such as the experts of a block.
    """
    descent = Descent([start])
    try:
        while descent.steps < race.descent:
            if evaluator.budget.over(f"step {descent.steps}", _tokens(evaluator, descent)):
                descent.stopped = "the budget is spent"
                break
            if not descent.steps:
                evaluator.bar.say(f"step 1 of {race.descent} downhill")
            if not _step(race, evaluator, descent, groups):
                descent.stopped = "no step is worth taking"
                break
        else:
            descent.stopped = "all steps are taken"
    except BlocksNotAlone as error:
        descent.stopped = "the model has no slopes"
        logger.warning("no descent: %s", error)
    except KeyboardInterrupt:
        if evaluator.budget.processes.count > 1 or not race.searches:
            raise
        descent.stopped = INTERRUPTED
    return descent


def _tokens(evaluator: Evaluator, descent: Descent) -> int:
    """Tokens that the next step computes: slopes, the current plan and its children."""
    return evaluator.tokens[0] * descent.text * (PASSES + len(LENGTHS) * len(SHAPES) + 1)


def _step(race: Race, evaluator: Evaluator, descent: Descent, groups: Sequence[Sequence[str]]) -> bool:
    """Tries one step; returns False when no further step can help."""
    pieces, grid = evaluator.ends[-1], evaluator.grid
    here, there = (sorted((descent.steps + i + j) % pieces for j in range(descent.text)) for i in (0, 1))
    slopes = evaluator.slopes(descent.point, here, race.metric)
    sizes = [sum(grid.sizes[name] for name in names) for names in groups]
    fresh = [
        math.fsum(slopes[name] * grid.sizes[name] for name in names) / size
        for names, size in zip(groups, sizes, strict=True)
    ]
    before = descent.slopes or fresh
    descent.slopes = [MEMORY * old + (1 - MEMORY) * new for old, new in zip(before, fresh, strict=True)]
    descent.steps += 1

    now = grid.fractions(descent.point)
    children: dict[Point, float] = {}
    least = max(0.6 / len(grid.zeros[name]) for name in grid.names)
    for length in LENGTHS:
        for shape in SHAPES:
            changes = level(descent.slopes, sizes, descent.length * length, shape, least)
            moved = dict(now)
            for names, change in zip(groups, changes, strict=True):
                moved |= {name: min(max(now[name] + change, 0.0), 1.0) for name in names}
            children.setdefault(grid.nearest(moved), length)
    children.pop(descent.point, None)
    if not children:
        return False
    bar, *values = [s.mean(race.metric) for s in evaluator.scores_on([descent.point, *children], there)]
    best = min(range(len(values)), key=values.__getitem__)
    evaluator.bar.say(f"step {descent.steps} of {race.descent} downhill: {race.metric} {min(bar, values[best]):.4f}")
    if values[best] < bar:
        point = list(children)[best]
        descent.points.append(point)
        descent.length = min(descent.length * children[point] * 1.1, LONGEST)
        return True
    worth = descent.length > SHORTEST or descent.text < pieces
    descent.length = max(descent.length / 2, SHORTEST)
    descent.text = min(2 * descent.text, pieces)
    return worth


def level(
    slopes: Sequence[float], sizes: Sequence[int], length: float, shape: float, least: float = 0.0
) -> list[float]:
    """Returns the change of each group's sparsity, against the slopes, such that the number of zeros stays the same.

    Args:
        slopes: of each group.
        sizes: weights of each group.
        length: the largest change, either way.
        shape: mean change / length, before changes are clamped.
        least: the smallest change that the grid can tell; used for `length` if that is smaller. Shorter steps then move
            fewer layers.
    """
    total = sum(sizes)
    mean = math.fsum(slope * size for slope, size in zip(slopes, sizes, strict=True)) / total
    spread = math.fsum(abs(slope - mean) for slope in slopes) / len(slopes)
    if not spread or not math.isfinite(spread):
        return [0.0] * len(slopes)
    rate, most = shape * length / spread, max(length, least)
    low, high = min(slopes), max(slopes)
    for _ in range(60):
        middle = (low + high) / 2
        changes = [min(max(rate * (middle - slope), -most), most) for slope in slopes]
        if math.fsum(change * size for change, size in zip(changes, sizes, strict=True)) > 0:
            high = middle
        else:
            low = middle
    return changes
