"""The page of a race or search: who did how well, the search over time, the best plans, and what the allocators measured."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plan import Plan
from ..race_record import RaceDetails
from ..records import Comparison, Interval
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
    chosen, story = plan.chosen, plan.story or RaceDetails()
    if chosen is None:
        raise ValueError("the plan was not made by a race or search; only theirs have a report")
    check_matplotlib()
    rows = [_candidate(row, chosen) for row in chosen["candidates"]]
    sources = _sources(chosen)
    plans, measures = _plans(plan, chosen, story), measured(plan, story.measures)
    return render(
        "report.html",
        title=f"{model_name(plan)}: {chosen['by']} of plans at {100 * plan.target:.4g} % sparsity",
        chosen=chosen,
        metric=_in_capitals(chosen["metric"]),
        rounds=[f"{_in_capitals(chosen['metric'])}, {tokens:,} tokens" for tokens in chosen["slices"]],
        rows=rows,
        winner=next(row for row in rows if row["wins"]),
        uniform=next(row for row in rows if row["kind"] == "uniform"),
        candidates=_draw_candidates(rows, chosen),
        certificate=Comparison.from_dict(chosen["certificate"]),
        sources=sources,
        columns=list(dict.fromkeys(name for values in sources.values() for name in values)),
        gains=_gains(chosen, story),
        search=_draw_search(chosen, story),
        plans=plans,
        plans_drawing=draw_for_page(plans),
        measures=measures,
        measures_drawing=draw_for_page(measures) if measures.panels else None,
        facts=_facts(plan, chosen, story),
    )


def _in_capitals(metric: str) -> str:
    return metric.upper() if metric == "kl" else metric


# ---- the candidates


def _candidate(row: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: `scores` of each round that the plan was in, `gain` over uniform in the last of them."""
    scores = row[chosen["metric"]]
    return {
        "name": row["name"],
        "kind": row["kind"],
        "wins": row["name"] == chosen["winner"],
        "scores": scores,
        "score": scores[-1],
        "tokens": chosen["slices"][len(scores) - 1],
        "gain": None if row["kind"] == "uniform" else Interval.from_dict(row["uniform_minus"]),
        "perplexity": row["perplexity"],
    }


def _draw_candidates(rows: list[dict[str, Any]], chosen: Mapping[str, Any]) -> Drawing | None:
    gains = {f"{row['name']}{' ★' * row['wins']}": row["gain"] for row in rows if row["gain"] is not None}
    caption = (
        f"uniform − plan, {_in_capitals(chosen['metric'])}, {100 * chosen['confidence']:g} % intervals; "
        "right of zero is better than uniform"
    )
    return draw_intervals(dict(list(gains.items())[:CHARTED]), caption) if gains else None


def _sources(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Whatever is recorded of each source of a calibration mix, {source: {name of a number: number}}."""
    sources = chosen.get("sources") or chosen["certificate"].get("sources") or {}
    return {source: _flat(values) for source, values in sources.items()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        for key, inner in (value if isinstance(value, Mapping) else {"": value}).items():
            flat[f"{name} {key}".strip()] = inner
    return flat


# ---- the search


def _gains(chosen: Mapping[str, Any], story: RaceDetails) -> list[tuple[int, float, float | None]]:
    """(tokens spent, the best metric so far, seconds since the start) at each gain; no seconds without a story."""
    if "search" not in chosen:
        return []
    return list(story.curve) or [(tokens, value, None) for tokens, value in chosen["search"]["curve"]]


def _draw_search(chosen: Mapping[str, Any], story: RaceDetails) -> Drawing | None:
    gains = _gains(chosen, story)
    if not gains:
        return None
    curves = [Curve("tokens through the model", [(tokens, value) for tokens, value, _ in gains])]
    if story.curve:
        points = [(seconds, value) for _, value, seconds in story.curve]
        curves.append(Curve("seconds since the start, race and descent included", points))
    judged = min(2, len(chosen["slices"])) - 1
    caption = f"{_in_capitals(chosen['metric'])} of the best so far, on {chosen['slices'][judged]:,} tokens"
    return draw_curves(curves, _levels(chosen, judged), caption)


def _levels(chosen: Mapping[str, Any], judged: int) -> dict[str, float]:
    """Uniform and the best single allocator on the text of a round, which the search looked at."""
    levels: dict[str, float] = {}
    for kind in ("uniform", "single"):
        rows = [row for row in chosen["candidates"] if row["kind"] == kind and len(row[chosen["metric"]]) > judged]
        if rows:
            best = min(rows, key=lambda row: row[chosen["metric"]][judged])
            levels[best["name"]] = best[chosen["metric"]][judged]
    return levels


# ---- the best plans


def _plans(plan: Plan, chosen: Mapping[str, Any], story: RaceDetails) -> Picture:
    plans = story.plans or {chosen["winner"]: {name: layer.sparsity for name, layer in plan.layers.items()}}
    titled = {}
    for name, layers in plans.items():
        row = _candidate(next(row for row in chosen["candidates"] if row["name"] == name), chosen)
        result = f"{_in_capitals(chosen['metric'])} {row['score']:.4f} on {row['tokens']:,} tokens"
        titled[f"{name}\n{'★ winner, ' * row['wins']}{row['kind']}, {result}"] = layers
    return side_by_side(plan, titled)


# ---- cost, text and model


def _facts(plan: Plan, chosen: Mapping[str, Any], story: RaceDetails) -> dict[str, dict[str, str]]:
    """Lists of what the race cost and was about: {title: {name: value in words}}."""
    data, spent, certified = chosen["data"], chosen["spent"], chosen["certificate"].get("data")
    model = {key: value for key, value in plan.model.items() if key not in ("layers", "weights", "name")}
    groups: dict[str, dict[str, Any]] = {
        "Cost": {
            "evaluations": f"{spent['evals']:,}",
            "tokens judged": f"{spent['tokens']:,}",
            **({"time": f"{story.seconds:.1f} s, measuring included"} if story.seconds else {}),
        },
        "Text": {
            "statistics": f"{data['statistics']} sequences",
            "choice": f"{data['selection']} sequences: {', '.join(f'{n:,}' for n in chosen['slices'])} tokens",
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
        inner = ", ".join(f"{key}={in_words(one)}" for key, one in value.items() if key != "name")
        return inner if "name" not in value else f"{value['name']}({inner})" if inner else str(value["name"])
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, str):
        return f"{value[:16]}…" if re.fullmatch("[0-9a-f]{64}", value) else value  # a fingerprint is whole in the plan
    return json.dumps(value)
