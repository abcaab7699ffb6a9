"""The page of a race or search: who did how well, the search over time, the best plans, and what the allocators measured.

One HTML file that loads nothing and runs nothing. Names come from models and users, so everything is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..plan import Plan
from ..race_record import RaceDetails
from ..records import Comparison, Interval
from . import curve, intervals
from .compare import measured, side_by_side
from .details import facts
from .grid import model_name
from .html import document, drawn, tables
from .intervals import Scale, draw_axis, draw_interval, judgement
from .panels import Picture

METRICS = {"kl": "KL from the dense model, nats a token", "loss": "loss of the next token, nats"}
JUDGED = {
    "better": "better than uniform beyond noise",
    "worse": "worse than uniform",
    "even": "not to be told from uniform",
}
SCALED = 10  # rows, the best, whose intervals fit on the scale; what is far worse is an arrow

STYLE = f"""
:root {{ --worse: #8f4a00; --mark: #eaf2fb }}
@media (prefers-color-scheme: dark) {{ :root {{ --worse: #efa55e; --mark: #14263b }} }}
body {{ max-width: 1360px; margin: 1.5rem auto; padding: 0 1rem }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem }}
p, dl {{ max-width: 60rem; overflow-wrap: anywhere }}
.quiet {{ color: var(--quiet) }}
.scroll {{ overflow-x: auto }}
.scroll:focus-visible {{ outline: 2px solid var(--accent) }}
.scroll table {{ font-variant-numeric: tabular-nums; border-collapse: separate; border-spacing: 0 }}
.scroll th, .scroll td {{ padding: .2rem .8rem .2rem .3rem; white-space: nowrap; border-bottom: 1px solid var(--empty) }}
.scroll thead th {{ vertical-align: bottom; font-weight: 600 }}
.scroll .number {{ text-align: right }}
.scroll tbody th {{ font-weight: 400; position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 9rem; overflow-wrap: anywhere }}
.scroll tr.winner th, .scroll tr.winner td {{ background: var(--mark); font-weight: 600 }}
.facts {{ display: flex; flex-wrap: wrap; gap: 0 3rem }}
.facts section {{ flex: 1 1 18rem; min-width: 0 }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .3rem 0 }}
dt {{ color: var(--quiet) }}
dd {{ margin: 0; min-width: 0 }}
code {{ white-space: nowrap; font-size: .9em }}
details details {{ margin-left: 1rem }}
h3 {{ font-size: .9rem; margin: .8rem 0 .2rem }}
{intervals.STYLE}{curve.STYLE}
@media (max-width: 600px) {{ body {{ margin: .8rem auto; padding: 0 .8rem }}
  .scroll table {{ font-size: 13px }} .scroll tbody th {{ min-width: 8rem; max-width: 38vw }} }}
"""


def draw_report(plan: Plan, file: str | os.PathLike[str]) -> Path:
    """The page of a plan that a race or search made, with its `story` where the plan still has it. Returns `file`.

    `ValueError` for any other plan, or one of too many blocks to look at.
    """
    return write_whole(file, page(plan).encode("utf-8", errors="replace"))


def page(plan: Plan) -> str:
    """The page as text."""
    chosen, story = plan.chosen, plan.story or RaceDetails()
    if chosen is None:
        raise ValueError("the plan was not made by a race or search; only theirs have a report")
    title = f"{model_name(plan)}: {chosen['by']} of plans at {100 * plan.target:.4g} % sparsity"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _verdict(chosen),
        _section("Candidates", _candidates(chosen)),
        _section("Certificate", _certificate(chosen["certificate"])),
        _section("By source of text", _sources(chosen)),
        _section("The search over time", _search(chosen, story)),
        _section("Sparsity by block and projection", _plans(plan, chosen, story)),
        _section("What the allocators measured on the dense model", _measures(plan, story)),
        _section("Cost, text and model", facts(plan, story)),
    ]
    return document(title, "\n".join(part for part in parts if part), STYLE)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


# ---- in words


def _verdict(chosen: Mapping[str, Any]) -> str:
    """Who wins, by how much, and whether text that nothing had seen agrees."""
    metric, winner = chosen["metric"], _row(chosen, chosen["winner"])
    uniform = next(row for row in chosen["candidates"] if row["kind"] == "uniform")
    said = f"<strong>{escape(winner['name'])}</strong> wins over {len(chosen['candidates']) - 1} other plans of the same sparsity"
    if winner["kind"] == "uniform":
        said += ": none of them is better beyond noise."
    else:
        tokens = chosen["slices"][len(winner[metric]) - 1]
        other = uniform[metric][len(winner[metric]) - 1]
        said += f": {_short(metric)} {winner[metric][-1]:.4f} where uniform has {other:.4f}, on {tokens:,} tokens."
        gain = Comparison.from_dict(chosen["certificate"]).kl.uniform_minus_chosen
        said += f" On text that nothing before has seen it is {JUDGED[judgement(gain)]} (KL {gain} lower)."
    return f"<p>{said}</p>"


def _short(metric: str) -> str:
    return metric.upper() if metric == "kl" else metric


def _row(chosen: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(row for row in chosen["candidates"] if row["name"] == name)


# ---- tables


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """`head` and `rows` are HTML. Scrolls by itself where it is wider than the page, with the keyboard too."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>\n'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _numbers(values: Sequence[str]) -> str:
    return "".join(f'<td class="number">{escape(value)}</td>' for value in values)


def _candidates(chosen: Mapping[str, Any]) -> str:
    metric, rows = chosen["metric"], chosen["candidates"]
    others = [row for row in rows if row["kind"] != "uniform"]
    scale = Scale.of([Interval.from_dict(row["uniform_minus"]) for row in others[:SCALED]])
    axis = draw_axis(scale, "scale; right of zero is better than uniform")
    head = ["plan", f"better than uniform →<br>{axis}"]
    head += [f"uniform − plan, {_short(metric)}<br>{100 * chosen['confidence']:g} % interval"]
    head += [*(f"{_short(metric)}<br>{n:,} tokens" for n in chosen["slices"]), "perplexity", "kind"]
    body = [_candidate(row, chosen, scale) for row in rows]
    note = (
        f"{METRICS[metric]}; less is better. Judged in rounds on growing text; of each round the better third goes on, “–” is "
        "out. Perplexity and the difference are of the last round a plan was in. Within noise the simpler plan wins."
    )
    if found := chosen.get("descent"):
        note += (
            f" The descent went from {found['from']}, against what a weight less costs in each layer: {found['gains']} of "
            f"{found['steps']} steps were taken; {found['stopped']}."
        )
    return f'{_table("Candidates", head, body)}\n<p class="quiet">{escape(note)}</p>'


def _candidate(row: Mapping[str, Any], chosen: Mapping[str, Any], scale: Scale) -> str:
    values = [f"{value:.4f}" for value in row[chosen["metric"]]]
    values += ["–"] * (len(chosen["slices"]) - len(values))
    gain, picture = "", ""
    if row["kind"] != "uniform":
        interval = Interval.from_dict(row["uniform_minus"])
        gain = str(interval)
        picture = draw_interval(interval, scale, f"{row['name']}: {gain}, {JUDGED[judgement(interval)]}")
    won = row["name"] == chosen["winner"]
    name = f"{_breaking(row['name'])}{' <strong>★ winner</strong>' * won}"
    numbers = _numbers([gain, *values, f"{row['perplexity']:.2f}"])
    mark = ' class="winner"' if won else ""
    return f'<tr{mark}><th scope="row">{name}</th><td>{picture}</td>{numbers}<td>{escape(row["kind"])}</td></tr>'


def _breaking(name: str) -> str:
    """Escaped; may break where its hyperparameters begin."""
    return escape(name).replace("(", "(<wbr>")


def _certificate(made: Mapping[str, Any]) -> str:
    """Returns a table of uniform against the chosen plan on text that took no part in choosing it."""
    compared, body = Comparison.from_dict(made), []
    for name, pair in (("KL", compared.kl), ("perplexity", compared.perplexity)):
        gain = pair.uniform_minus_chosen
        picture = draw_interval(gain, Scale.of([gain]), f"{name}: {gain}")
        numbers = _numbers([str(gain), f"{pair.uniform:.4f}", f"{pair.chosen:.4f}"])
        body.append(f'<tr><th scope="row">{name}</th><td>{picture}</td>{numbers}</tr>')
    between = f"uniform − chosen, {100 * (compared.confidence or 0):g} % interval"
    head = ["on untouched text", "better than uniform →", between, "uniform", "chosen"]
    note = (
        f"On {compared.predictions:,} predictions in {compared.sequences} sequences that took no part in statistics or choice. "
        f"{compared.resamples} paired resamples of the sequences, seed {compared.seed}. Of the masks on the dense weights; pruning "
        "adds what the pruner makes of them."
    )
    return f'{_table("Certificate", head, body)}\n<p class="quiet">{escape(note)}</p>'


def _sources(chosen: Mapping[str, Any]) -> str:
    """Whatever is recorded of each source of a calibration mix: numbers by name, or by two names."""
    sources = chosen.get("sources") or chosen["certificate"].get("sources")
    if not sources:
        return ""
    flat = {source: _flat(found) for source, found in sources.items()}
    head = list(dict.fromkeys(key for found in flat.values() for key in found))
    body = [
        f'<tr><th scope="row">{escape(source)}</th>{_numbers([found.get(key, "") for key in head])}</tr>'
        for source, found in flat.items()
    ]
    return _table("By source of text", ["source", *map(escape, head)], body)


def _flat(found: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in found.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        for key, one in inner.items():
            flat[f"{name} {key}".strip()] = f"{one:.4f}" if isinstance(one, float) else str(one)
    return flat


# ---- pictures


def _search(chosen: Mapping[str, Any], story: RaceDetails) -> str:
    """The best so far against tokens and seconds; without a story there are no seconds."""
    if "search" not in chosen:
        return ""
    metric, found = chosen["metric"], chosen["search"]
    points = story.curve or tuple((tokens, value, 0.0) for tokens, value in found["curve"])
    slice_ = min(2, len(chosen["slices"])) - 1
    up = f"{_short(metric)} of the best so far, on {chosen['slices'][slice_]:,} tokens"
    lines = _levels(chosen, slice_)
    tips = [f"{value:.4f} after {tokens:,} tokens, {seconds:.1f} s" for tokens, value, seconds in points]
    ways = [("against tokens spent", 0, "tokens through the model", _thousands)]
    if story.curve:
        ways.append(("against time", 2, "seconds since the start, race and descent included", _seconds))
    shown = [
        curve.draw_curve(
            title,
            [(point[column], point[1], tip) for point, tip in zip(points, tips, strict=True)],
            across=across,
            up=up,
            show=show,
            lines=lines,
        )
        for title, column, across, show in ways
    ]
    rows = "".join(f"<tr><td>{escape(tip)}</td></tr>\n" for tip in tips)
    note = f"{found['generations']} generations; it stopped: {found['stopped']}. The steps begin where the race and its descent ended."
    return (
        f'<div class="panels">\n{"".join(shown)}</div>\n<p class="quiet">{escape(note)}</p>\n'
        f"<details><summary>All gains</summary>\n<table>\n{rows}</table></details>"
    )


def _levels(chosen: Mapping[str, Any], slice_: int) -> dict[str, float]:
    """Uniform and the best single allocator on the text that the search looked at."""
    levels: dict[str, float] = {}
    for kind in ("uniform", "single"):
        known = [row for row in chosen["candidates"] if row["kind"] == kind and len(row[chosen["metric"]]) > slice_]
        best = min(known, key=lambda row: row[chosen["metric"]][slice_], default=None)
        if best is not None:
            levels[best["name"]] = best[chosen["metric"]][slice_]
    return levels


def _thousands(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _seconds(value: float) -> str:
    return f"{value:g}"


def _plans(plan: Plan, chosen: Mapping[str, Any], story: RaceDetails) -> str:
    found = story.plans or {chosen["winner"]: {name: layer.sparsity for name, layer in plan.layers.items()}}
    titled = {}
    for name, layers in found.items():
        row = _row(chosen, name)
        tokens = chosen["slices"][len(row[chosen["metric"]]) - 1]
        won = "★ winner, " * (name == chosen["winner"])
        said = f"{won}{row['kind']}, {_short(chosen['metric'])} {row[chosen['metric']][-1]:.4f} on {tokens:,} tokens"
        titled[f"{name}\n{said}"] = layers
    return _pictures(side_by_side(plan, titled), "Blocks down, projections across; percent of the weights removed.")


def _measures(plan: Plan, story: RaceDetails) -> str:
    picture = measured(plan, story.measures)
    return _pictures(picture, "Each in numbers of its own; point at a cell for more.") if picture.panels else ""


def _pictures(picture: Picture, note: str) -> str:
    notes = escape(" ".join([note, *(f"{one.capitalize()}." for one in picture.notes)]))
    numbers = f"<details><summary>All numbers</summary>\n{tables(picture)}</details>"
    return f'<p class="quiet">{notes}</p>\n{drawn(picture)}\n{numbers}'
