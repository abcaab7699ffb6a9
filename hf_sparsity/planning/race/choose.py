"""Choose a plan by race or search: split the text, measure once, let the plans compete, certify the winner."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...algorithm import Allocator, ModelOracle, Pattern
from ...allocators.race import Race, Search, parse_budget
from ...calibration.batches import batch_tokens, data_fingerprint
from ...calibration.splits import Split
from ...config import SparsityConfig
from ...core.budget_grid import Grid, Point
from ...core.nested_masks import Ranks
from ...evaluation.by_source import compare_by_source
from ...evaluation.certificate import compare
from ...evaluation.divergence import DenseReference, PlanScores
from ...model.inference import Batch
from ...race_record import RaceRecord
from ...records import Comparison, SourcePlans
from ..allocate import Choice, assign, numbers
from ..preparation import Prepared
from .candidates import Candidate, allocators, group_experts, measurement_key
from .descent import INTERRUPTED, descend
from .evaluator import Evaluator, SearchBudget, cut
from .evolution import run_search
from .record import candidate_records, make_details
from .successive_halving import ScoredCandidate, judge, ranking, run_race, winner
from .survey import Measures, survey

logger = logging.getLogger(__name__)

CERTIFICATE_PASSES = 3  # of the dense model, uniform and the winner, over the certificate's text


def choose(run: Prepared, config: SparsityConfig, race: Race, sources: Sequence[str] = ()) -> Choice:
    """Runs a race or a search over the model and returns the plan that wins.

    Beside the model it holds one byte a weight, the hidden states of the text for choice and certificate, and while a
    block runs a masked copy of it. `run.hidden_limit` is for the pass that measures.

    Args:
        sources: of each calibration sequence of a mix.

    Raises:
        ValueError: batches that are no text, or too few of them.
    """
    if not all({"input_ids", "decoder_input_ids"} & batch.keys() for batch in run.data):
        raise ValueError(f"{race.name} judges plans on text: batches with input_ids are expected")
    pattern = Pattern.parse(config.pattern)
    split = Split.of(run.data, race.slices[-1])
    budget = SearchBudget(parse_budget(race.budget), run.processes, run.journal)
    competing = allocators(race.candidates)
    unseen: dict[str, str] = {}
    measures, ranks = survey(
        run.model,
        run.model_layers,
        split.statistics,
        allocators=list(dict.fromkeys(map(measurement_key, competing.values()))),
        pruner=config.pruner,
        pattern=pattern,
        hidden_limit=run.hidden_limit,
        notes=unseen,
    )
    evaluator = _evaluator(run, config, race, ranks, split, budget)
    candidates = _candidates(evaluator, config, race, competing, measures)

    search: dict[str, Any] | None = None
    curve: list[tuple[int, float, float]] = []
    with evaluator.bar:
        scored = run_race(race, evaluator, candidates, pattern)
        descent = _descend(race, evaluator, scored) if race.descent else None
        if isinstance(race, Search) and (descent or {}).get("stopped") != INTERRUPTED:
            blocks = [list(block.weights) for block in run.model_layers.blocks if block.weights]
            search, curve = _search(race, evaluator, scored, blocks, config.seed)

    best = winner(race, scored, config.seed)
    pair = next(entry for entry in scored if entry.kind == "uniform"), best
    certificate, by_source = _certify(run, race, evaluator, pair, split.certificate, sources, config.seed)
    record = RaceRecord(
        by=race.name,
        metric=race.metric,
        winner=best.name,
        kind=best.kind,
        slices=tuple(evaluator.tokens),
        confidence=race.confidence,
        seed=config.seed,
        candidates=candidate_records(race, scored, config.seed),
        spent=dict(budget.spent),
        descent=descent,
        search=search,
        sources=by_source,
        stand_in=config.pruner.stand_in,
        data=split.to_dict(run.data),
        certificate=certificate,
    )
    logger.info("%s: %s wins, %s %.5f", race.name, best.name, race.metric, best.last.mean(race.metric))
    details = make_details(best, ranking(race, scored), measures, curve, budget.seconds("the choice"))
    allocator = competing.get(best.name)  # None: the winner is a mixture, or comes from a descent or search
    measured = numbers(allocator, measures[measurement_key(allocator)]) if allocator else {}
    seen = [*split.statistics, *split.selection]
    return Choice(best.candidate.sparsities, measured, record.to_dict(), seen, details, unseen)


def _evaluator(
    run: Prepared,
    config: SparsityConfig,
    race: Race,
    ranks: Mapping[str, Ranks],
    split: Split,
    budget: SearchBudget,
) -> Evaluator:
    """Judges plans on the grid that the ranks allow, on the split's text for the choice."""
    sizes = {name: weight.size for name, weight in run.model_layers.weights.items()}
    zeros, cells = ({name: getattr(ranks[name], what) for name in sizes} for what in ("zeros", "cells"))
    grid = Grid(zeros, sizes, cells, config.sparsity, Pattern.parse(config.pattern).group)
    pieces, ends = cut(split.selection, race.slices)
    references = [DenseReference(run.model, run.model_layers, piece) for piece in pieces]
    budget.after = CERTIFICATE_PASSES * sum(map(batch_tokens, split.certificate))
    budget.begin()
    return Evaluator(references, grid, ranks, budget, ends)


def _candidates(
    evaluator: Evaluator,
    config: SparsityConfig,
    race: Race,
    competing: Mapping[str, Allocator],
    measures: Mapping[Allocator, Measures],
) -> list[Candidate]:
    """The plan of each allocator; those that ask for losses get the metric on the race's first slice."""
    grid, pattern = evaluator.grid, Pattern.parse(config.pattern)

    def losses(plans: Sequence[Mapping[str, float]]) -> list[float]:
        return [scores.mean(race.metric) for scores in evaluator.scores([grid.nearest(plan) for plan in plans], 0)]

    oracle = ModelOracle(config.seed, lambda plan: losses([plan])[0], None, losses)
    candidates = []
    for name, allocator in competing.items():
        shared = measures[measurement_key(allocator)]
        sparsities = assign(allocator, shared, grid.sizes, config.sparsity, pattern=pattern, oracle=oracle)
        kind = "uniform" if allocator.name == "uniform" else "single"
        candidates.append(Candidate(name, kind, sparsities, allocator.to_dict()))
    return candidates


def _descend(race: Race, evaluator: Evaluator, scored: list[ScoredCandidate]) -> dict[str, Any]:
    """Descends from the best plan and adds where it ends, if that is new; returns what to record."""
    best = ranking(race, scored)[0]
    descent = descend(race, evaluator, best.point, group_experts(evaluator.grid.names))
    record = {"from": best.name, **descent.to_dict()}
    _join(evaluator, scored, "descent", descent.point, record)
    return record


def _join(
    evaluator: Evaluator, scored: list[ScoredCandidate], kind: str, point: Point, origin: Mapping[str, Any]
) -> None:
    """Adds a new point, judged in all rounds that there were."""
    if point in {entry.point for entry in scored}:
        return
    new = ScoredCandidate(Candidate(kind, kind, evaluator.grid.sparsities(point), {kind: dict(origin)}), point)
    for number in range(max(len(entry.scores) for entry in scored)):
        judge(evaluator, [new], number)
    scored.append(new)


def _search(
    search: Search, evaluator: Evaluator, scored: list[ScoredCandidate], blocks: list[list[str]], seed: int
) -> tuple[dict[str, Any], list[tuple[int, float, float]]]:
    """Searches from the best plans and adds the best that it finds, if that is new; returns what to record, and the curve."""
    order = ranking(search, scored)
    result = run_search(search, evaluator, [entry.point for entry in order[: search.offspring]], blocks, seed)
    ended = (evaluator.budget.spent["tokens"], result.curve[-1][1])
    curve = [(*point, seconds) for point, seconds in zip([*result.curve, ended], result.seconds, strict=True)]
    _join(evaluator, scored, "search", result.point, {"generations": result.generations, "stopped": result.stopped})
    record = {"generations": result.generations, "stopped": result.stopped, "curve": [list(p) for p in result.curve]}
    return record, curve


def _certify(
    run: Prepared,
    race: Race,
    evaluator: Evaluator,
    pair: Sequence[ScoredCandidate],
    batches: list[Batch],
    sources: Sequence[str],
    seed: int,
) -> tuple[Comparison, dict[str, SourcePlans] | None]:
    """Compares the pair, uniform and the winner, on the certificate's text; and by source, where there are some.

    Scored are masks on the dense weights, before anything is pruned; `prune` scores what the pruner makes of the plan.
    """
    reference = DenseReference(run.model, run.model_layers, batches)
    uniform, chosen = (PlanScores.of(evaluator.rows(entry.point, reference)) for entry in pair)
    compared = compare(uniform, chosen, confidence=race.confidence, seed=seed)
    by_source = compare_by_source(sources[-len(batches) :], uniform, chosen) if sources else None
    return replace(compared, of="masks", data=data_fingerprint(batches)), by_source
