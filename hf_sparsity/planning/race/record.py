"""What a race or search writes down: how each plan did, for the plan's JSON, and the details that stay beside the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...algorithm import Allocator
from ...allocators.race import Race
from ...race_record import CandidateRecord, RaceDetails
from ..allocate import numbers
from .candidates import KINDS, with_options
from .successive_halving import ScoredCandidate, difference, ranking
from .survey import Measures

PLANS_SHOWN = 6  # plans that a report shows side by side


def candidate_records(race: Race, scored: Sequence[ScoredCandidate], seed: int) -> tuple[CandidateRecord, ...]:
    """Returns how each plan did, the best first."""
    uniform = next(entry for entry in scored if entry.kind == "uniform")
    return tuple(
        CandidateRecord(
            name=entry.name,
            kind=entry.kind,
            origin=dict(entry.candidate.origin),
            scores=tuple(scores.mean(race.metric) for scores in entry.scores),
            perplexity=entry.last.perplexity,
            uniform_minus=difference(race, uniform.scores[len(entry.scores) - 1], entry.last, seed),
        )
        for entry in ranking(race, scored)
    )


def make_details(
    best: ScoredCandidate,
    order: Sequence[ScoredCandidate],
    measures: Mapping[Allocator, Measures],
    curve: Sequence[tuple[int, float, float]],
    seconds: float,
) -> RaceDetails:
    """Returns what a page shows beyond the record; `order` has all plans, the best first."""
    plans = {entry.name: dict(entry.candidate.sparsities) for entry in _shown(best, order)}
    return RaceDetails(plans, _measured(measures), tuple(curve), seconds)


def _shown(best: ScoredCandidate, order: Sequence[ScoredCandidate]) -> list[ScoredCandidate]:
    """The winner, the first of each kind, and then the next best, up to `PLANS_SHOWN`."""
    kinds = {entry.kind for entry in order}
    firsts = [next(entry for entry in order if entry.kind == kind) for kind in KINDS if kind in kinds]
    return list({entry.name: entry for entry in (best, *firsts, *order)}.values())[:PLANS_SHOWN]


def _measured(measures: Mapping[Allocator, Measures]) -> dict[str, dict[str, float]]:
    """The finite measures by allocator, named with the hyperparameters that its measure depends on, and by layer.

    Allocators that measure nothing are left out.
    """
    result: dict[str, dict[str, float]] = {}
    for allocator, blocks in measures.items():
        if type(allocator).measure is Allocator.measure:
            continue
        options = {key: getattr(allocator, key) for key in allocator.race_grid if key not in allocator.only_in_assign}
        finite = {n: x for n, x in numbers(allocator, blocks).items() if x is not None and math.isfinite(x)}
        if finite:
            result[with_options(allocator.name, options)] = finite
    return result
