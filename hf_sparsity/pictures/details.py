"""What a race cost, and what it was about: text, model, config and versions, as lists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from ..plan import Plan
from ..race_record import RaceDetails
from .grid import model_name


def facts(plan: Plan, story: RaceDetails) -> str:
    """All of it as HTML."""
    chosen = plan.chosen or {}
    groups = {
        "Cost": _cost(chosen, story),
        "Text": _text(plan, chosen),
        "Model": _model(plan),
        "Config": {"seed": 0, **plan.config},
        "Versions": plan.versions,
    }
    return f'<div class="facts">\n{"".join(_group(title, found) for title, found in groups.items() if found)}</div>'


def _cost(chosen: Mapping[str, Any], story: RaceDetails) -> dict[str, Any]:
    spent = chosen["spent"]
    cost = {"evaluations": f"{spent['evals']:,}", "tokens judged": f"{spent['tokens']:,}"}
    if story.seconds:
        cost["time"] = f"{story.seconds:.1f} s, measuring included"
    return cost


def _model(plan: Plan) -> dict[str, Any]:
    prints = {f"fingerprint of {key}": plan.model.get(key) for key in ("layers", "weights")}
    known = {key: value for key, value in plan.model.items() if key not in ("layers", "weights")}
    return {**known, "name": model_name(plan), "layers to prune": len(plan.layers), **prints}


def _text(plan: Plan, chosen: Mapping[str, Any]) -> dict[str, Any]:
    data = chosen["data"]
    found = {
        "statistics": f"{data['statistics']} sequences",
        "choice": f"{data['selection']} sequences: {', '.join(f'{n:,}' for n in chosen['slices'])} tokens",
        "certificate": f"{data['certificate']} sequences",
        "fingerprint of all": data["sha256"],
    }
    if certified := chosen["certificate"].get("data"):
        found["of the certificate's"] = certified["sha256"]
    if plan.data:
        found["of the others"] = plan.data.get("sha256")
    return found


def _group(title: str, found: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt>{_fact(value)}\n" for key, value in found.items())
    return f"<section><h3>{escape(title)}</h3>\n<dl>\n{rows}</dl></section>\n"


def _fact(value: Any) -> str:
    """Of a fingerprint the beginning; the plan has it whole."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f'<dd title="{value}"><code>{value[:16]}…</code></dd>'
    return f"<dd>{escape(_said(value))}</dd>"


def _said(value: Any) -> str:
    """A value of JSON types for people: `owl(outlier=5.0)` for an algorithm, nothing for what is not set."""
    if value is None or value == [] or value == ():
        return "–"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}={_said(one)}" for key, one in value.items() if key != "name")
        return inner if "name" not in value else f"{value['name']}({inner})" if inner else str(value["name"])
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value))
    return value if isinstance(value, str) else json.dumps(value)
