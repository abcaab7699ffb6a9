"""Scores plans on slices of text, remembers the scores, and counts what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...calibration.batches import batch_tokens
from ...checkpoint.journal import Item, Journal, digest, remembered
from ...core.budget_grid import Grid, Point
from ...core.nested_masks import Ranks
from ...distributed import Processes
from ...evaluation.divergence import DenseReference, PlanScores, SequenceSums
from ...model.inference import Batch
from ...model.layers import Block
from ...progress import Bar
from .sensitivity import PASSES, Sums, layer_sensitivities, window


@dataclass
class SearchBudget:
    """What a race may spend and has spent; the same on all processes.

    `limits`: from `parse_budget`. `spent`: evaluations (one plan on one piece of text) and tokens. `after`: tokens that are
    computed after the choice, for which time is left.
    """

    limits: Mapping[str, float]
    processes: Processes
    journal: Journal | None = None
    spent: dict[str, int] = field(default_factory=lambda: {"evals": 0, "tokens": 0})
    after: int = 0
    _first: float | None = None  # seconds at which the first plan was judged
    _before: float = 0.0
    _start: float = field(default_factory=lambda: time.perf_counter())

    def begin(self) -> None:
        """Notes the time from which on tokens are counted, by which the time that others will take is foreseen."""
        self._first = self.seconds("the first plan")

    def over(self, moment: str, ahead: int = 0) -> bool:
        """Returns whether the budget is spent, or too little time is left for the next `ahead` tokens and those after the choice.

        `moment` names the point in the run, where an interrupted one had used time too.
        """
        if self.is_timed:
            now, rate = self.seconds(moment), 0.0
            if self._first is not None and self.spent["tokens"]:
                rate = (now - self._first) / self.spent["tokens"]
            if now + rate * (ahead + self.after) >= self.limits["seconds"]:
                return True
        return any(self.spent[kind] >= limit for kind, limit in self.limits.items() if kind in self.spent)

    @property
    def is_timed(self) -> bool:
        """True if the time is limited."""
        return "seconds" in self.limits

    def seconds(self, moment: str) -> float:
        """Returns the seconds since the start, with those that an interrupted run had taken until this `moment`."""
        earlier = self.journal.recall("elapsed", moment) if self.journal else None
        if earlier is not None:
            self._before, self._start = float(earlier), time.perf_counter()
            return self._before
        now = float(self.processes.gather(self._before + time.perf_counter() - self._start)[0])
        if self.journal:
            self.journal.remember("elapsed", moment, now)
        return now


class Evaluator:
    """Judges points of the grid on pieces of text; a slice is the first of them, up to a number.

    A score is never computed twice, in one run or after an interruption. Points are shared out among processes;
    each is judged by one of them, on the same batches, so that the numbers do not depend on how many there are.
    """

    def __init__(
        self,
        pieces: Sequence[DenseReference],
        grid: Grid,
        ranks: Mapping[str, Ranks],
        budget: SearchBudget,
        ends: Sequence[int] | None = None,
    ):
        self.grid, self.budget = grid, budget
        self.bar = Bar("Racing", unit="plan", shown=bool(pieces) and budget.processes.main)
        self._pieces, self._ranks = pieces, ranks
        self._rows: dict[tuple[int, Point], SequenceSums] = {}
        self.ends = list(ends or range(1, len(pieces) + 1))
        self.tokens = [sum(batch_tokens(b) for p in pieces[:end] for b in p.batches) for end in self.ends]

    def scores(self, points: Sequence[Point], slice_: int) -> list[PlanScores]:
        """Returns the scores of each plan on the slice with this number."""
        return self.scores_on(points, range(self.ends[slice_]))

    def scores_on(self, points: Sequence[Point], pieces: Sequence[int]) -> list[PlanScores]:
        """Returns the scores of each plan on the pieces with these numbers."""
        for piece in pieces:
            self._judge([p for p in dict.fromkeys(points) if (piece, p) not in self._rows], piece)
        return [PlanScores.of([row for i in pieces for row in self._rows[i, p]]) for p in points]

    def _judge(self, points: Sequence[Point], piece: int) -> None:
        reference = self._pieces[piece]
        names = {digest([piece, list(point)]): point for point in points}

        def compute(point: Point) -> SequenceSums:
            rows = self.rows(point, reference)
            self.bar.step()
            return rows

        for name, rows in self._remembered("score", names, compute).items():
            self._rows[piece, names[name]] = rows
            self.budget.spent["evals"] += 1
            self.budget.spent["tokens"] += sum(map(batch_tokens, reference.batches))

    def _remembered(self, what: str, items: Mapping[str, Item], compute: Callable[[Item], Any]) -> dict[str, Any]:
        return remembered(self.budget.journal, self.budget.processes, what, items, compute)

    def slopes(self, point: Point, pieces: Sequence[int], metric: str) -> dict[str, float]:
        """Returns by how much pruning one more weight of each layer would raise the metric at a point, on these pieces.

        Batches are shared out among processes, and their sums are added in a fixed order.

        Raises:
            BlocksNotAlone: the model's blocks cannot be computed one by one.
        """
        parts = [(piece, i) for piece in pieces for i in range(len(self._pieces[piece].batches))]
        steps = dict(zip(self.grid.names, point, strict=True))

        def compute(part: tuple[int, int]) -> Sums:
            return layer_sensitivities(self._pieces[part[0]], part[1], self._ranks, steps, metric)

        names = {digest(["slopes", metric, *part, list(point)]): part for part in parts}
        sums: list[Sums] = list(self._remembered("slopes", names, compute).values())
        self.budget.spent["tokens"] += PASSES * sum(batch_tokens(self._pieces[p].batches[i]) for p, i in parts)
        predictions = sum(part[-1] for part in sums)
        slopes = {}
        for i, (name, step) in enumerate(zip(self.grid.names, point, strict=True)):
            first, last = window(self._ranks[name], step)
            weights = self.grid.zeros[name][last] - self.grid.zeros[name][first]
            slopes[name] = math.fsum(part[i] for part in sums) / max(predictions * weights, 1)
        return slopes

    def rows(self, point: Point, reference: DenseReference) -> SequenceSums:
        """Returns the sums of each sequence for the model masked to a point, on the reference's text."""
        steps = dict(zip(self.grid.names, point, strict=True))

        def masks(block: Block) -> dict[str, Tensor]:
            return {name: self._ranks[name].mask(steps[name]) for name in block.weights if steps[name]}

        return reference.rows(masks)


def cut(batches: Sequence[Batch], slices: Sequence[int]) -> tuple[list[list[Batch]], list[int]]:
    """Cuts batches into pieces; returns (pieces, number of pieces in each slice).

    A piece has at least as many tokens as the first slice, but the last piece of a slice may have fewer. Slices for
    which there is no text left are not there.

    Args:
        slices: tokens that each slice has at least, ascending.
    """
    pieces: list[list[Batch]] = []
    ends: list[int] = []
    taken, rest = 0, list(batches)
    for tokens in slices:
        while rest and taken < tokens:
            piece: list[Batch] = []
            before = taken
            while rest and taken < min(before + slices[0], tokens):
                taken += batch_tokens(rest[0])
                piece.append(rest.pop(0))
            pieces.append(piece)
        if len(pieces) > (ends[-1] if ends else 0):
            ends.append(len(pieces))
    return pieces, ends
