"""Choose a plan by race or search: split the text, measure once, let the plans compete, certify the winner."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..algorithm import Allocator, Pattern, Probe
from ..allocators.race import Race, Search, parse_budget
from ..config import SparsityConfig
from ..core.ranks import Grid, Point
from ..story import Story
from .batches import fingerprint
from .by_source import compare_by_source
from .certificate import compare
from .contest import Allowance, Contest, batch_tokens, cut
from .descent import INTERRUPTED, descend
from .drive import Batch
from .entrants import ASSIGNED, GRID, KINDS, Entrant, allocators, enter, measured_as, together
from .journal import Journal
from .judge import Reference, Scores
from .layers import Layout
from .measure import algorithms
from .processes import Processes
from .race import Runner, judge, ranking, results, run_race, winner
from .search import run_search
from .survey import Measures, survey

logger = logging.getLogger(__name__)

TOLD = 6  # plans in the story, side by side
FEWEST = 8  # sequences: two to certify, three to choose by, three for statistics


@dataclass(frozen=True)
class Split:
    """Calibration batches, in their order: for the pruner's statistics, for the choice, for the certificate."""

    statistics: list[Batch]
    selection: list[Batch]
    certificate: list[Batch]

    @classmethod
    def of(cls, data: Sequence[Batch], most: int) -> Split:
        """A quarter certifies and three eighths choose, but neither with more than `most` tokens.

        `ValueError` for too few sequences.
        """
        if len(data) < FEWEST:
            raise ValueError(
                f"{len(data)} calibration sequences cannot be split into statistics, choice and certificate; give at least {FEWEST}"
            )
        rest = list(data)
        certificate = _last(rest, len(data) // 4, most)
        selection = _last(rest, len(data) * 3 // 8, most)
        return cls(rest, selection, certificate)

    def to_dict(self, data: Sequence[Batch]) -> dict[str, Any]:
        """How many sequences each has, and which data they are of."""
        counts = {name: len(part) for name, part in vars(self).items()}
        return {**counts, "sha256": fingerprint(data)["sha256"]}


def _last(rest: list[Batch], count: int, most: int) -> list[Batch]:
    """Takes up to `count` from the end, fewer where they exceed `most` tokens, but at least two."""
    taken: list[Batch] = []
    while len(taken) < count and (len(taken) < 2 or sum(map(batch_tokens, [*taken, rest[-1]])) <= most):
        taken.insert(0, rest.pop())
    return taken


def split_of(chosen: Mapping[str, Any] | None, data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(what may be pruned with, the certificate's) of the data that a plan was chosen on; of other data all and nothing."""
    facts = (chosen or {}).get("data", {})
    count = facts.get("certificate", 0) if isinstance(facts, Mapping) else 0
    if not data or not isinstance(count, int) or not 0 < count < len(data):
        return list(data), []
    if facts.get("sha256") != fingerprint(data)["sha256"]:
        return list(data), []
    return list(data[:-count]), list(data[-count:])


@dataclass(frozen=True)
class Choice:
    """`sparsities` and what else stands in the plan: `numbers` (one a layer), `record` of a race, the `data` it saw.

    `story`: what a race saw beyond that.
    """

    sparsities: Mapping[str, float]
    numbers: Mapping[str, float | None]
    record: dict[str, Any] | None
    data: list[Batch]
    story: Story | None = None


def choose(
    model: PreTrainedModel,
    layout: Layout,
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
    race, pruner = algorithms(config)
    assert isinstance(race, Race)
    pattern, target = Pattern.parse(config.pattern), float(config.sparsity)  # type: ignore[arg-type]
    if not all({"input_ids", "decoder_input_ids"} & batch.keys() for batch in data):
        raise ValueError(f"{race.name} judges plans on text: batches with input_ids are expected")
    split = Split.of(data, race.slices[-1])
    allowance = Allowance(parse_budget(race.budget), processes, journal)
    entering = allocators(race.candidates)
    wanted = {measured_as(one): name for name, one in entering.items()}
    measures, ranks = survey(
        model, layout, split.statistics, allocators=wanted, pruner=pruner, pattern=pattern, hidden_limit=hidden_limit
    )
    sizes = {name: weight.size for name, weight in layout.weights.items()}
    zeros, cells = ({n: getattr(ranks[n], what) for n in sizes} for what in ("zeros", "cells"))
    grid = Grid(zeros, sizes, cells, target, pattern.group)
    pieces, ends = cut(split.selection, race.slices)
    contest = Contest([Reference(model, layout, piece) for piece in pieces], grid, ranks, allowance, ends)

    def losses(candidates: Sequence[Mapping[str, float]]) -> list[float]:
        points = [grid.nearest(candidate) for candidate in candidates]
        return [scores.mean(race.metric) for scores in contest.scores(points, 0)]

    probe = Probe(config.seed, lambda one: losses([one])[0], None, losses)
    entrants = [
        enter(name, one, measures[measured_as(one)], sizes, target, pattern=pattern, probe=probe)
        for name, one in entering.items()
    ]
    runners = run_race(race, contest, entrants, pattern)
    extra: dict[str, Any] = {}
    curve: list[tuple[int, float, float]] = []
    if race.descent:
        extra["descent"] = _descend(race, contest, runners)
    if isinstance(race, Search) and extra.get("descent", {}).get("stopped") != INTERRUPTED:
        found, curve = _search(race, contest, runners, layout, config.seed)
        extra |= found
    best = winner(race, runners, config.seed)
    uniform = next(r for r in runners if r.entrant.kind == "uniform")
    judged = _judged(contest, Reference(model, layout, split.certificate), uniform, best)
    if sources:
        extra["sources"] = compare_by_source(sources[-len(split.certificate) :], *judged)
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
        "certificate": compare(*judged, confidence=race.confidence, seed=config.seed)
        | {"of": "masks", "data": fingerprint(split.certificate)},
    }
    logger.info("%s: %s wins, %s %.5f", race.name, best.entrant.name, race.metric, best.last.mean(race.metric))
    story = Story(
        {r.entrant.name: dict(r.entrant.sparsities) for r in _told(best, ranking(race, runners))},
        _measured(measures),
        tuple(curve),
        allowance.seconds("the choice"),
    )
    seen = [*split.statistics, *split.selection]
    return Choice(best.entrant.sparsities, _numbers(entering, measures, best), record, seen, story)


def _descend(race: Race, contest: Contest, runners: list[Runner]) -> dict[str, Any]:
    """Adds where a descent from the best runner ends, if it gets anywhere; returns what to record."""
    best = ranking(race, runners)[0]
    found = descend(race, contest, best.point, together(contest.grid.names))
    record = {"from": best.entrant.name, **found.to_dict()}
    _join(contest, runners, "descent", found.point, record)
    return record


def _join(contest: Contest, runners: list[Runner], kind: str, point: Point, origin: Mapping[str, Any]) -> None:
    """Has a new point judged in all rounds that there were."""
    if point in {r.point for r in runners}:
        return
    made = Runner(Entrant(kind, kind, contest.grid.sparsities(point), {kind: dict(origin)}), point)
    for number in range(max(len(r.scores) for r in runners)):
        judge(contest, [made], number)
    runners.append(made)


def _search(
    search: Search, contest: Contest, runners: list[Runner], layout: Layout, seed: int
) -> tuple[dict[str, Any], list[tuple[int, float, float]]]:
    """Adds the best that the search finds to the runners, if it is new; returns what to record, and the story's curve."""
    blocks = [list(block.weights) for block in layout.blocks if block.weights]
    order = ranking(search, runners)
    found = run_search(search, contest, [r.point for r in order[: search.offspring]], blocks, seed)
    ended = (contest.allowance.spent["tokens"], found.curve[-1][1])
    curve = [(*point, seconds) for point, seconds in zip([*found.curve, ended], found.seconds, strict=True)]
    _join(contest, runners, "search", found.point, {"generations": found.generations, "stopped": found.stopped})
    record = {"generations": found.generations, "stopped": found.stopped, "curve": [list(p) for p in found.curve]}
    return {"search": record}, curve


def _judged(contest: Contest, reference: Reference, uniform: Runner, best: Runner) -> tuple[Scores, Scores]:
    """Of the masks on the dense weights; what the pruner makes of the plan is scored after it has."""
    one, other = (Scores.of(contest.rows(runner.point, reference)) for runner in (uniform, best))
    return one, other


def _numbers(entering: Mapping[str, Any], measures: Mapping[Any, Measures], best: Runner) -> dict[str, float | None]:
    """The winner's measure of each layer, if it is an allocator."""
    one = entering.get(best.entrant.name)
    if one is None:
        return {}
    return {name: one.number(value) for block in measures[measured_as(one)] for name, value in block.items()}


def _told(best: Runner, order: Sequence[Runner]) -> list[Runner]:
    """The winner, the first of each kind, and then the next best, as far as there is room to look at them."""
    firsts = [
        next(r for r in order if r.entrant.kind == kind) for kind in KINDS if kind in {r.entrant.kind for r in order}
    ]
    return list({r.entrant.name: r for r in (best, *firsts, *order)}.values())[:TOLD]


def _measured(measures: Mapping[Allocator, Measures]) -> dict[str, dict[str, float]]:
    """{allocator, with the hyperparameters that its measure depends on: {layer: number}}, of those that look at something."""
    found: dict[str, dict[str, float]] = {}
    for one, blocks in measures.items():
        if type(one).measure is Allocator.measure:
            continue
        keys = [key for key in GRID.get(one.name, {}) if key not in ASSIGNED.get(one.name, ())]
        said = ", ".join(f"{key}={getattr(one, key)}" for key in keys)
        numbers = {name: one.number(value) for block in blocks for name, value in block.items()}
        known = {name: number for name, number in numbers.items() if number is not None and math.isfinite(number)}
        if known:
            found[f"{one.name}({said})" if said else one.name] = known
    return found
