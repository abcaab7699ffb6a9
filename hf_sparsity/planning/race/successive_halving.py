"""The race: successive halving over plans of one budget, on growing slices of text.

Jamieson and Talwalkar, AISTATS 2016, https://arxiv.org/abs/1502.07943, with paired comparisons at the end: the plan
chosen is the simplest of those that are not significantly worse than the best.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
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
    """A candidate, the point of the grid nearest to it, and its scores in each round that it took part in."""

    candidate: Candidate
    point: Point
    scores: list[PlanScores] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name that tells the candidate apart."""
        return self.candidate.name

    @property
    def kind(self) -> str:
        """The kind of the candidate, one of `KINDS`."""
        return self.candidate.kind

    @property
    def last(self) -> PlanScores:
        """The scores on the longest slice it was judged on."""
        return self.scores[-1]


def run_race(
    race: Race, evaluator: Evaluator, candidates: Sequence[Candidate], pattern: Pattern
) -> list[ScoredCandidate]:
    """Returns all candidates, those that came furthest first, the better before the worse; uniform is judged in all rounds.

    The first round is always run, if time is short only in part; later ones while the budget lasts.
    """
    last, certified = len(evaluator.tokens) - 1, evaluator.budget.after
    evaluator.budget.after += evaluator.tokens[0]  # the end of the descent is judged in all rounds
    scored = _judged_in_time(evaluator, distinct(evaluator, candidates), "plan")
    order = ranking(race, scored)
    mixed = mixtures([entry.candidate for entry in order], evaluator.grid.sizes, evaluator.grid.target, pattern)
    points = {entry.point for entry in scored}
    new = [entry for entry in distinct(evaluator, mixed) if entry.point not in points]
    scored += _judged_in_time(evaluator, new, "mixture")
    for number in range(1, last + 1):
        order = [entry for entry in ranking(race, scored) if len(entry.scores) == number]
        through = order[: max(MIXED, math.ceil(len(order) / REDUCTION))]
        through += [entry for entry in order if entry.kind == "uniform" and entry not in through]
        ahead = len(through) * (evaluator.tokens[number] - evaluator.tokens[number - 1])
        if evaluator.budget.over(f"round {number}", ahead + evaluator.tokens[number] - evaluator.tokens[number - 1]):
            logger.info("race: the budget is spent after slices of %d tokens", evaluator.tokens[number - 1])
            break
        evaluator.budget.after = certified + evaluator.tokens[number]
        judge(evaluator, through, number)
    return ranking(race, scored)


def _judged_in_time(evaluator: Evaluator, scored: Sequence[ScoredCandidate], what: str) -> list[ScoredCandidate]:
    """Judges candidates on the first slice; with little time only some, of each allocator the first ones first."""
    if not evaluator.budget.is_timed:
        judge(evaluator, scored, 0)
        return list(scored)
    seen: Counter[str] = Counter()
    order = []
    for entry in scored:
        kind = str(entry.candidate.origin.get("name"))
        order.append((seen[kind], entry))
        seen[kind] += 1
    done: list[ScoredCandidate] = []
    for _, entry in sorted(order, key=lambda pair: pair[0]):
        certain = what == "plan" and len(done) < 2  # uniform, and one to compare with it
        if evaluator.budget.over(f"{what} {len(done)}", evaluator.tokens[0]) and not certain:
            logger.info("race: no time for %d of %d plans", len(scored) - len(done), len(scored))
            break
        judge(evaluator, [entry], 0)
        done.append(entry)
    return done


def distinct(evaluator: Evaluator, candidates: Sequence[Candidate]) -> list[ScoredCandidate]:
    """Returns the candidates that differ on the grid; of equal ones the first."""
    by_point: dict[Point, ScoredCandidate] = {}
    for candidate in candidates:
        point = evaluator.grid.nearest(candidate.sparsities)
        by_point.setdefault(point, ScoredCandidate(candidate, point))
    return list(by_point.values())


def judge(evaluator: Evaluator, scored: Sequence[ScoredCandidate], slice_: int) -> None:
    """Adds to each candidate its scores on the slice with this number."""
    alone = evaluator.budget.processes.count == 1  # several share the list
    groups = [[entry] for entry in scored] if alone else [list(scored)]
    best = (math.inf, "")
    for group in groups:
        trying = f"{group[0].name} on {evaluator.tokens[slice_]} tokens" if alone and group else ""
        evaluator.bar.say(trying + (f"; best so far {best[1]}, KL {best[0]:.4f}" if best[1] else ""))
        for entry, scores in zip(group, evaluator.scores([entry.point for entry in group], slice_), strict=True):
            entry.scores.append(scores)
            best = min(best, (scores.mean(), entry.name))


def ranking(race: Race, scored: Sequence[ScoredCandidate]) -> list[ScoredCandidate]:
    """Returns the candidates in order: those judged on the longest slice first, then by the metric."""
    return sorted(scored, key=lambda entry: (-len(entry.scores), entry.last.mean(race.metric), entry.name))


def difference(race: Race, one: PlanScores, other: PlanScores, seed: int) -> Interval:
    """Returns the mean per token of `one` minus `other`, on the same sequences, with its interval."""
    pairs = torch.stack([getattr(one, race.metric), getattr(other, race.metric)], dim=1)
    return paired_bootstrap(pairs, one.tokens, confidence=race.confidence, seed=seed)


def winner(race: Race, scored: Sequence[ScoredCandidate], seed: int) -> ScoredCandidate:
    """Returns the simplest plan of the last round that is not significantly worse than the best.

    A plan with a worse mean than a simpler one is never chosen.
    """
    best = ranking(race, scored)[0]
    final = [entry for entry in ranking(race, scored) if len(entry.scores) == len(best.scores)]
    simpler = math.inf
    for kind in KINDS:
        first = next((entry for entry in final if entry.kind == kind), None)
        if first is None or first.last.mean(race.metric) >= simpler:
            continue
        if not difference(race, first.last, best.last, seed).is_above_zero:
            return first
        simpler = first.last.mean(race.metric)
    return best
