"""The page of a race or search: who did how well, the search over time, the best plans, and what the allocators measured."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plan import Plan
from ..race_record import CandidateRecord, RaceDetails, RaceRecord
from .canvas import Drawing, check_matplotlib
from .charts import Curve, draw_curves, draw_intervals
from .compare import measured, side_by_side
from .grid import model_name
from .heatmaps import draw_for_page
from .pages import render, write_page
from .panels import Picture

CHARTED = 30  # candidates, the best, whose intervals are drawn; the table has all


def draw_report(plan: Plan, file: str | os.PathLike[str]) -> Path:
    """Writes the page of a plan that a race or search made, with its `story` where the plan still has it. Returns `file`.

    Raises ValueError for any other plan, for one of too many blocks to look at, and without matplotlib.
    """
    return write_page(page(plan), file)


def page(plan: Plan) -> str:
    """Returns the page as text."""
    if plan.chosen is None:
        raise ValueError("the plan was not made by a race or search; only theirs have a report")
    race, story = RaceRecord.from_dict(plan.chosen), plan.story or RaceDetails()
    check_matplotlib()
    rows = [_row(candidate, race) for candidate in race.candidates]
    plans, measures = _plans(plan, race, story), measured(plan, story.measures)
    return render(
        "report.html",
        title=f"{model_name(plan)}: {race.by} of plans at {100 * plan.target:.4g} % sparsity",
        race=race,
        metric=_in_capitals(race.metric),
        rounds=[f"{_in_capitals(race.metric)}, {tokens:,} tokens" for tokens in race.slices],
        rows=rows,
        winner=next(row for row in rows if row["wins"]),
        uniform=next(row for row in rows if row["kind"] == "uniform"),
        candidates=_draw_candidates(rows, race),
        gains=_gains(race, story),
        search=_draw_search(race, story),
        plans=plans,
        plans_drawing=draw_for_page(plans),
        measures=measures,
        measures_drawing=draw_for_page(measures) if measures.panels else None,
        facts=_facts(plan, race, story),
    )


def _in_capitals(metric: str) -> str:
    return metric.upper() if metric == "kl" else metric


# ---- the candidates


def _row(candidate: CandidateRecord, race: RaceRecord) -> dict[str, Any]:
    """A row of the table: `scores` of each round that the plan was in, `gain` over uniform in the last of them."""
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "wins": candidate.name == race.winner,
        "scores": candidate.scores,
        "score": candidate.scores[-1],
        "tokens": race.slices[len(candidate.scores) - 1],
        "gain": None if candidate.kind == "uniform" else candidate.uniform_minus,
        "perplexity": candidate.perplexity,
    }


def _draw_candidates(rows: list[dict[str, Any]], race: RaceRecord) -> Drawing | None:
    gains = {f"{row['name']}{' ★' * row['wins']}": row["gain"] for row in rows if row["gain"] is not None}
    caption = (
        f"uniform − plan, {_in_capitals(race.metric)}, {100 * race.confidence:g} % intervals; "
        "right of zero is better than uniform"
    )
    return draw_intervals(dict(list(gains.items())[:CHARTED]), caption) if gains else None


# ---- the search


def _gains(race: RaceRecord, story: RaceDetails) -> list[tuple[int, float, float | None]]:
    """(tokens spent, the best metric so far, seconds since the start) at each gain; no seconds without a story."""
    if race.search is None:
        return []
    return list(story.curve) or [(tokens, value, None) for tokens, value in race.search["curve"]]


def _draw_search(race: RaceRecord, story: RaceDetails) -> Drawing | None:
    gains = _gains(race, story)
    if not gains:
        return None
    curves = [Curve("tokens through the model", [(tokens, value) for tokens, value, _ in gains])]
    if story.curve:
        points = [(seconds, value) for _, value, seconds in story.curve]
        curves.append(Curve("seconds since the start, race and descent included", points))
    judged = min(2, len(race.slices)) - 1
    caption = f"{_in_capitals(race.metric)} of the best so far, on {race.slices[judged]:,} tokens"
    return draw_curves(curves, _levels(race, judged), caption)


def _levels(race: RaceRecord, judged: int) -> dict[str, float]:
    """Uniform and the best single allocator on the text of a round, which the search looked at."""
    levels: dict[str, float] = {}
    for kind in ("uniform", "single"):
        scored = [entry for entry in race.candidates if entry.kind == kind and len(entry.scores) > judged]
        if scored:
            best = min(scored, key=lambda entry: entry.scores[judged])
            levels[best.name] = best.scores[judged]
    return levels


# ---- the best plans


def _plans(plan: Plan, race: RaceRecord, story: RaceDetails) -> Picture:
    plans = story.plans or {race.winner: {name: layer.sparsity for name, layer in plan.layers.items()}}
    titled = {}
    for name, layers in plans.items():
        row = _row(next(candidate for candidate in race.candidates if candidate.name == name), race)
        result = f"{_in_capitals(race.metric)} {row['score']:.4f} on {row['tokens']:,} tokens"
        titled[f"{name}\n{'★ winner, ' * row['wins']}{row['kind']}, {result}"] = layers
    return side_by_side(plan, titled)


# ---- cost, text and model


def _facts(plan: Plan, race: RaceRecord, story: RaceDetails) -> dict[str, dict[str, str]]:
    """Lists of what the race cost and was about: {title: {name: value in words}}."""
    data, spent, certified = race.data, race.spent, race.certificate.data
    model = {key: value for key, value in plan.model.items() if key not in ("layers", "weights", "name")}
    groups: dict[str, dict[str, Any]] = {
        "Cost": {
            "evaluations": f"{spent['evals']:,}",
            "tokens judged": f"{spent['tokens']:,}",
            **({"time": f"{story.seconds:.1f} s, measuring included"} if story.seconds else {}),
        },
        "Text": {
            "statistics": f"{data['statistics']} sequences",
            "choice": f"{data['selection']} sequences: {', '.join(f'{n:,}' for n in race.slices)} tokens",
            "certificate": f"{data['certificate']} sequences",
            "fingerprint of all": data["sha256"],
            **({"fingerprint of the certificate's": certified["sha256"]} if certified else {}),
            **({"fingerprint of the others": plan.data.get("sha256")} if plan.data else {}),
        },
        "Model": {
            **model,
            "name": model_name(plan),
            "layers to prune": len(plan.layers),
            "fingerprint of layers": plan.model.get("layers"),
            "fingerprint of weights": plan.model.get("weights"),
        },
        "Config": {"seed": 0, **plan.config},
        "Versions": dict(plan.versions),
    }
    return {title: {name: in_words(value) for name, value in group.items()} for title, group in groups.items() if group}


def in_words(value: Any) -> str:
    """A value of JSON types for people: `owl(outlier=5.0)` for an algorithm, a dash for what is not set."""
    if value is None or value == [] or value == ():
        return "–"
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={in_words(option)}" for key, option in value.items() if key != "name")
        return options if "name" not in value else f"{value['name']}({options})" if options else str(value["name"])
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, str):
        return f"{value[:16]}…" if re.fullmatch("[0-9a-f]{64}", value) else value  # a fingerprint is whole in the plan
    return json.dumps(value)
