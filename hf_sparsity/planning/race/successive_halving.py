"""The race: successive halving over plans of one budget, on growing slices of text.

Jamieson and Talwalkar, AISTATS 2016, https://arxiv.org/abs/1502.07943, with paired comparisons at the end: the plan
chosen is the simplest of those that are not significantly worse than the best.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...algorithm import Pattern
from ...allocators.race import Race
from ...core.bootstrap import paired_bootstrap
from ...core.budget_grid import Point
from ...evaluation.divergence import PlanScores
from ...records import Interval
from .candidates import KINDS, MIXED, Candidate, mixtures
from .evaluator import Evaluator

logger = logging.getLogger(__name__)

REDUCTION = 3  # each round keeps the best third, but at least MIXED


@dataclass
class ScoredCandidate:
    """A candidate, the point of the grid nearest to it, and its scores in each round."""

    entrant: Candidate
    point: Point
    scores: list[PlanScores] = field(default_factory=list)

    @property
    def last(self) -> PlanScores:
        """The scores on the longest slice it was judged on."""
        return self.scores[-1]


def run_race(race: Race, contest: Evaluator, entrants: Sequence[Candidate], pattern: Pattern) -> list[ScoredCandidate]:
    """Returns all candidates, those that came furthest first, the better before the worse; uniform is judged in all rounds.

    The first round is always run; later ones while the budget lasts.
    """
    runners = distinct(contest, entrants)
    last = len(contest.tokens) - 1
    judge(contest, runners, 0)
    order = ranking(race, runners)
    made = mixtures([r.entrant for r in order], contest.grid.sizes, contest.grid.target, pattern)
    joined = [r for r in distinct(contest, made) if r.point not in {one.point for one in runners}]
    judge(contest, joined, 0)
    runners += joined
    for number in range(1, last + 1):
        if contest.allowance.over(f"round {number}"):
            logger.info("race: the budget is spent after slices of %d tokens", contest.tokens[number - 1])
            break
        order = [r for r in ranking(race, runners) if len(r.scores) == number]
        through = order[: max(MIXED, math.ceil(len(order) / REDUCTION))]
        judge(contest, [*through, *(r for r in order if r.entrant.kind == "uniform" and r not in through)], number)
    return ranking(race, runners)


def distinct(contest: Evaluator, entrants: Sequence[Candidate]) -> list[ScoredCandidate]:
    """Returns the candidates that differ on the grid; of equal ones the first."""
    found: dict[Point, ScoredCandidate] = {}
    for entrant in entrants:
        point = contest.grid.nearest(entrant.sparsities)
        found.setdefault(point, ScoredCandidate(entrant, point))
    return list(found.values())


def judge(contest: Evaluator, runners: Sequence[ScoredCandidate], slice_: int) -> None:
    """Adds the scores of each on one slice."""
    for runner, scores in zip(runners, contest.scores([r.point for r in runners], slice_), strict=True):
        runner.scores.append(scores)


def ranking(race: Race, runners: Sequence[ScoredCandidate]) -> list[ScoredCandidate]:
    """Returns the candidates in order: those judged on the longest slice first, then by the metric."""
    return sorted(runners, key=lambda r: (-len(r.scores), r.last.mean(race.metric), r.entrant.name))


def difference(race: Race, one: PlanScores, other: PlanScores, seed: int) -> Interval:
    """Returns the mean per token of `one` minus `other`, on the same sequences, with its interval."""
    pairs = torch.stack([getattr(one, race.metric), getattr(other, race.metric)], dim=1)
    return paired_bootstrap(pairs, one.tokens, confidence=race.confidence, seed=seed)


def winner(race: Race, runners: Sequence[ScoredCandidate], seed: int) -> ScoredCandidate:
    """Returns the simplest plan of the last round that is not significantly worse than the best.

    A plan with a worse mean than a simpler one is never chosen.
    """
    best = ranking(race, runners)[0]
    final = [r for r in ranking(race, runners) if len(r.scores) == len(best.scores)]
    simpler = math.inf
    for kind in KINDS:
        first = next((r for r in final if r.entrant.kind == kind), None)
        if first is None or first.last.mean(race.metric) >= simpler:
            continue
        if not difference(race, first.last, best.last, seed).is_above_zero:
            return first
        simpler = first.last.mean(race.metric)
    return best
