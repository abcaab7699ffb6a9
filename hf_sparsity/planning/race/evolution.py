"""The search: evolution from the best plans of a race; it can stop at any time with the best plan so far.

After EvoPress (Sieberling et al., ICML 2025, https://arxiv.org/abs/2410.14649): one parent, children by moves that keep
the budget, judged in stages. Here a move is weighted by size, so that layers of different shapes can trade; it may move
whole blocks, projections or ranges of blocks; its length adapts; and a step that helped is tried again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from ...allocators.race import Search
from ...core.budget_grid import Grid, Point
from .candidates import group_by, group_experts
from .evaluator import Evaluator

logger = logging.getLogger(__name__)

LONGEST, SHORTEST = 0.25, 0.004  # sparsity that the smaller side of a move gains or loses
SEEDS = 8  # plans: the best of the race, towards which a child may move

Vector = dict[str, float]


@dataclass
class Moves:
    """Moves from one point to another of the same budget; all randomness comes from `random`."""

    grid: Grid
    blocks: Sequence[Sequence[str]]  # the layers of each block, in model order
    random: Random
    length: float = 0.05
    single: list[list[str]] = field(init=False)
    kinds: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        """Groups the layers: experts of one name, and all layers whose names differ in numbers only."""
        names = [name for block in self.blocks for name in block]
        self.single = group_experts(names)
        self.kinds = group_by(names, lambda name: re.sub(r"\d+", "", name))

    def child(self, parent: Point, towards: Sequence[Vector], step: Vector | None) -> Point:
        """Returns one child: mostly a transfer or two; sometimes a move towards another plan, or along the last step that helped."""
        now = self.grid.fractions(parent)
        chance = self.random.random()
        if chance < 0.15 and towards:
            other, part = self.random.choice(towards), self.random.uniform(0.1, 0.6)
            now = {name: s + part * (other[name] - s) for name, s in now.items()}
        elif chance < 0.35 and step:
            part = self.random.uniform(0.5, 2.0)
            now = {name: s + part * step[name] for name, s in now.items()}
        else:
            for _ in range(self.random.choice((1, 1, 2, 3))):
                self.transfer(now)
        return self.grid.nearest({name: min(max(s, 0.0), 1.0) for name, s in now.items()})

    def transfer(self, now: Vector) -> None:
        """Moves weights from one random group of layers to another, in place."""
        giving, taking = self.group(), self.group()
        giving = [name for name in giving if name not in set(taking)]
        if not giving or not taking:
            return
        sides = [sum(self.grid.sizes[name] for name in names) for names in (giving, taking)]
        amount = self.length * min(1.0, 2 * self.random.random()) * min(sides)
        for names, size, sign in zip((giving, taking), sides, (-1, 1), strict=True):
            for name in names:
                now[name] += sign * amount / size

    def group(self) -> list[str]:
        """Returns a random group: mostly one layer; or a block, a range of blocks, or a projection in all blocks or a range."""
        chance = self.random.random()
        if chance < 0.55:
            return list(self.random.choice(self.single))
        if chance < 0.7:
            return list(self.random.choice(self.blocks))
        first, last = sorted(self.random.randrange(len(self.blocks)) for _ in range(2))
        stretch = [name for block in self.blocks[first : last + 1] for name in block]
        if chance < 0.8:
            return stretch
        kind = list(self.random.choice(self.kinds))
        return kind if chance < 0.9 else [name for name in kind if name in set(stretch)]


def _judged(search: Search, evaluator: Evaluator, points: Sequence[Point], pieces: Sequence[int]) -> list[float]:
    return [scores.mean(search.metric) for scores in evaluator.scores_on(points, pieces)]


def _better(
    search: Search, evaluator: Evaluator, parent: Point, points: Sequence[Point], pieces: Sequence[int]
) -> list[Point]:
    """The best of the points on these pieces if it is better than the parent, else nothing."""
    if not points:
        return []
    bar, *values = _judged(search, evaluator, [parent, *points], pieces)
    best = min(range(len(points)), key=values.__getitem__)
    return [points[best]] if values[best] < bar else []


@dataclass
class SearchResult:
    """The state of a search.

    Args:
        point: the best so far.
        generations: how many there were.
        curve: (tokens spent, the metric of the best on the longest slice) at each gain.
        stopped: why it ended.
        seconds: since the start, at each point of the curve and at the end; they differ from run to run.
    """

    point: Point
    generations: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    seconds: list[float] = field(default_factory=list, compare=False)


def run_search(
    search: Search, evaluator: Evaluator, seeds: Sequence[Point], blocks: Sequence[Sequence[str]], seed: int
) -> SearchResult:
    """Evolves the best of `seeds` until the budget is spent, nothing improves, or it is interrupted.

    Children are judged on one piece of the text, a different one in each generation, so that none is overfitted. Those
    that beat the parent there, at most a quarter, are judged on as many pieces as the second slice has, and the best of
    them on all, where it has to beat the parent too. `seed` determines everything except how far a time limit reaches.

    Args:
        seeds: points to start from, the best of a race.
        blocks: the layers of each block, in model order.
    """
    values = _judged(search, evaluator, seeds, range(evaluator.ends[-1]))
    best = min(range(len(seeds)), key=lambda i: (values[i], i))
    result = SearchResult(seeds[best])
    _note(evaluator, result, values[best])
    moves = Moves(evaluator.grid, blocks, Random(seed))
    towards = [evaluator.grid.fractions(point) for point in seeds[:SEEDS] if point != result.point]
    try:
        _evolve(search, evaluator, result, moves, towards)
    except KeyboardInterrupt:
        if evaluator.budget.processes.count > 1:
            raise
        result.stopped = "interrupted"
    result.seconds.append(evaluator.budget.seconds("end of the search"))
    first, last = result.curve[0][1], result.curve[-1][1]
    logger.info("search: %s %.5f -> %.5f in %d generations", search.metric, first, last, result.generations)
    return result


def _note(evaluator: Evaluator, result: SearchResult, value: float) -> None:
    """Adds a point to the curve, and shows it."""
    evaluator.bar.say(f"generation {result.generations}: best so far {value:.4f}")
    result.curve.append((evaluator.budget.spent["tokens"], value))
    result.seconds.append(evaluator.budget.seconds(f"generation {result.generations}"))


def _evolve(
    search: Search,
    evaluator: Evaluator,
    result: SearchResult,
    moves: Moves,
    towards: Sequence[Vector],
) -> None:
    step: Vector | None = None
    pieces = evaluator.ends[-1]
    stages = [evaluator.ends[1], pieces] if len(evaluator.ends) > 2 else [pieces]
    seen, stale = {result.point}, 0
    while not evaluator.budget.over(f"generation {result.generations}"):
        if stale >= search.patience:
            result.stopped = f"no gain in {stale} generations"
            return
        children: list[Point] = []
        for _ in range(20 * search.offspring):
            child = moves.child(result.point, towards, step)
            if child not in seen:
                seen.add(child)
                children.append(child)
            if len(children) == search.offspring:
                break
        if not children:
            result.stopped = "no new plan within reach"
            return
        text = [(result.generations + i) % pieces for i in range(pieces)]
        bar, *values = _judged(search, evaluator, [result.point, *children], text[:1])
        hopeful = sorted((v, i) for i, v in enumerate(values) if v < bar)[: max(1, search.offspring // 4)]
        points = [children[i] for _, i in hopeful]
        for stage in stages:
            points = _better(search, evaluator, result.point, points, sorted(text[:stage]))
        result.generations += 1
        if points:
            point, value = points[0], _judged(search, evaluator, points[:1], range(pieces))[0]
            old, new = evaluator.grid.fractions(result.point), evaluator.grid.fractions(point)
            step = {name: new[name] - old[name] for name in new}
            result.point, stale = point, 0
            _note(evaluator, result, value)
            moves.length = min(moves.length * 1.3, LONGEST)
        else:
            step, stale = None, stale + 1
            moves.length = max(moves.length * 0.95, SHORTEST)
    result.stopped = "the budget is spent"
