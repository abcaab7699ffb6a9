"""Choose a plan by race or search: split the text, measure once, let the plans compete, certify the winner."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ...algorithm import Allocator, ModelOracle, Pattern
from ...allocators.race import Race, Search, parse_budget
from ...calibration.batches import data_fingerprint
from ...calibration.splits import Split
from ...checkpoint.journal import Journal
from ...config import SparsityConfig
from ...core.budget_grid import Grid, Point
from ...distributed import Processes
from ...evaluation.by_source import compare_by_source
from ...evaluation.certificate import compare
from ...evaluation.divergence import DenseReference, PlanScores
from ...model.inference import Batch
from ...model.layers import ModelLayers
from ...race_record import RaceDetails
from .candidates import KINDS, Candidate, allocators, enter, group_experts, measurement_key, with_options
from .descent import INTERRUPTED, descend
from .evaluator import Evaluator, SearchBudget, cut
from .evolution import run_search
from .successive_halving import ScoredCandidate, judge, ranking, results, run_race, winner
from .survey import Measures, survey

logger = logging.getLogger(__name__)

PLANS_SHOWN = 6  # plans in the story, side by side


@dataclass(frozen=True)
class Choice:
    """`sparsities` and what else stands in the plan: `numbers` (one a layer), `record` of a race, the `data` it saw.

    `story`: what a race saw beyond that.
    """

    sparsities: Mapping[str, float]
    numbers: Mapping[str, float | None]
    record: dict[str, Any] | None
    data: list[Batch]
    story: RaceDetails | None = None


def choose(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    data: Sequence[Batch],
    config: SparsityConfig,
    processes: Processes,
    *,
    journal: Journal | None = None,
    hidden_limit: int | None = None,
    sources: Sequence[str] = (),
) -> Choice:
    """Runs the race or the search that the config asks for.

    Beside the model: one byte a weight, the hidden states of the text for choice and certificate, and while a block
    runs a masked copy of it. `hidden_limit` is for the pass that measures. `sources`: of each sequence of a mix.
    """
    race, pruner = config.allocator, config.pruner
    assert isinstance(race, Race)
    pattern, target = Pattern.parse(config.pattern), config.sparsity
    if not all({"input_ids", "decoder_input_ids"} & batch.keys() for batch in data):
        raise ValueError(f"{race.name} judges plans on text: batches with input_ids are expected")
    split = Split.of(data, race.slices[-1])
    allowance = SearchBudget(parse_budget(race.budget), processes, journal)
    entering = allocators(race.candidates)
    wanted = {measurement_key(one): name for name, one in entering.items()}
    measures, ranks = survey(
        model,
        model_layers,
        split.statistics,
        allocators=wanted,
        pruner=pruner,
        pattern=pattern,
        hidden_limit=hidden_limit,
    )
    sizes = {name: weight.size for name, weight in model_layers.weights.items()}
    zeros, cells = ({n: getattr(ranks[n], what) for n in sizes} for what in ("zeros", "cells"))
    grid = Grid(zeros, sizes, cells, target, pattern.group)
    pieces, ends = cut(split.selection, race.slices)
    contest = Evaluator([DenseReference(model, model_layers, piece) for piece in pieces], grid, ranks, allowance, ends)

    def losses(candidates: Sequence[Mapping[str, float]]) -> list[float]:
        points = [grid.nearest(candidate) for candidate in candidates]
        return [scores.mean(race.metric) for scores in contest.scores(points, 0)]

    probe = ModelOracle(config.seed, lambda one: losses([one])[0], None, losses)
    entrants = [
        enter(name, one, measures[measurement_key(one)], sizes, target, pattern=pattern, probe=probe)
        for name, one in entering.items()
    ]
    runners = run_race(race, contest, entrants, pattern)
    extra: dict[str, Any] = {}
    curve: list[tuple[int, float, float]] = []
    if race.descent:
        extra["descent"] = _descend(race, contest, runners)
    if isinstance(race, Search) and extra.get("descent", {}).get("stopped") != INTERRUPTED:
        found, curve = _search(race, contest, runners, model_layers, config.seed)
        extra |= found
    best = winner(race, runners, config.seed)
    uniform = next(r for r in runners if r.entrant.kind == "uniform")
    judged = _judged(contest, DenseReference(model, model_layers, split.certificate), uniform, best)
    if sources:
        extra["sources"] = compare_by_source(sources[-len(split.certificate) :], *judged)
    certificate = compare(*judged, confidence=race.confidence, seed=config.seed)
    record = {
        "by": race.name,
        "metric": race.metric,
        "winner": best.entrant.name,
        "kind": best.entrant.kind,
        "slices": contest.tokens,
        "confidence": race.confidence,
        "seed": config.seed,
        "candidates": results(race, contest, runners, config.seed),
        "spent": dict(allowance.spent),
        **extra,
        "data": split.to_dict(data),
        "certificate": replace(certificate, of="masks", data=data_fingerprint(split.certificate)).to_dict(),
    }
    logger.info("%s: %s wins, %s %.5f", race.name, best.entrant.name, race.metric, best.last.mean(race.metric))
    story = RaceDetails(
        {r.entrant.name: dict(r.entrant.sparsities) for r in _told(best, ranking(race, runners))},
        _measured(measures),
        tuple(curve),
        allowance.seconds("the choice"),
    )
    seen = [*split.statistics, *split.selection]
    return Choice(best.entrant.sparsities, _numbers(entering, measures, best), record, seen, story)


def _descend(race: Race, contest: Evaluator, runners: list[ScoredCandidate]) -> dict[str, Any]:
    """Adds where a descent from the best runner ends, if it gets anywhere; returns what to record."""
    best = ranking(race, runners)[0]
    found = descend(race, contest, best.point, group_experts(contest.grid.names))
    record = {"from": best.entrant.name, **found.to_dict()}
    _join(contest, runners, "descent", found.point, record)
    return record


def _join(
    contest: Evaluator, runners: list[ScoredCandidate], kind: str, point: Point, origin: Mapping[str, Any]
) -> None:
    """Has a new point judged in all rounds that there were."""
    if point in {r.point for r in runners}:
        return
    made = ScoredCandidate(Candidate(kind, kind, contest.grid.sparsities(point), {kind: dict(origin)}), point)
    for number in range(max(len(r.scores) for r in runners)):
        judge(contest, [made], number)
    runners.append(made)


def _search(
    search: Search, contest: Evaluator, runners: list[ScoredCandidate], model_layers: ModelLayers, seed: int
) -> tuple[dict[str, Any], list[tuple[int, float, float]]]:
    """Adds the best that the search finds to the runners, if it is new; returns what to record, and the story's curve."""
    blocks = [list(block.weights) for block in model_layers.blocks if block.weights]
    order = ranking(search, runners)
    found = run_search(search, contest, [r.point for r in order[: search.offspring]], blocks, seed)
    ended = (contest.allowance.spent["tokens"], found.curve[-1][1])
    curve = [(*point, seconds) for point, seconds in zip([*found.curve, ended], found.seconds, strict=True)]
    _join(contest, runners, "search", found.point, {"generations": found.generations, "stopped": found.stopped})
    record = {"generations": found.generations, "stopped": found.stopped, "curve": [list(p) for p in found.curve]}
    return {"search": record}, curve


def _judged(
    contest: Evaluator, reference: DenseReference, uniform: ScoredCandidate, best: ScoredCandidate
) -> tuple[PlanScores, PlanScores]:
    """Of the masks on the dense weights; what the pruner makes of the plan is scored after it has."""
    one, other = (PlanScores.of(contest.rows(runner.point, reference)) for runner in (uniform, best))
    return one, other


def _numbers(
    entering: Mapping[str, Any], measures: Mapping[Any, Measures], best: ScoredCandidate
) -> dict[str, float | None]:
    """The winner's measure of each layer, if it is an allocator."""
    one = entering.get(best.entrant.name)
    if one is None:
        return {}
    return {name: one.number(value) for block in measures[measurement_key(one)] for name, value in block.items()}


def _told(best: ScoredCandidate, order: Sequence[ScoredCandidate]) -> list[ScoredCandidate]:
    """The winner, the first of each kind, and then the next best, as far as there is room to look at them."""
    firsts = [
        next(r for r in order if r.entrant.kind == kind) for kind in KINDS if kind in {r.entrant.kind for r in order}
    ]
    return list({r.entrant.name: r for r in (best, *firsts, *order)}.values())[:PLANS_SHOWN]


def _measured(measures: Mapping[Allocator, Measures]) -> dict[str, dict[str, float]]:
    """{allocator, with the hyperparameters that its measure depends on: {layer: number}}, of those that look at something."""
    found: dict[str, dict[str, float]] = {}
    for one, blocks in measures.items():
        if type(one).measure is Allocator.measure:
            continue
        options = {key: getattr(one, key) for key in one.race_grid if key not in one.only_in_assign}
        numbers = {name: one.number(value) for block in blocks for name, value in block.items()}
        known = {name: number for name, number in numbers.items() if number is not None and math.isfinite(number)}
        if known:
            found[with_options(one.name, options)] = known
    return found
