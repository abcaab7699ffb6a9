"""Fills in the template of a model card: what it prints, checked, and the filters that format it.

The template prints into Markdown, so its escaping is that of Markdown: whatever is no `Markup` becomes a code span.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup

from ...checkpoint.source import LEFT_OUT
from ...config import CHOOSERS
from ...evaluation.metrics import Score
from ...pictures.grid import Grid, make_grid
from ...records import Comparison, Interval
from . import markdown
from .citations import PAPERS, RECOVERY
from .commands import BASE, RECOVER, TABLES, TEXT, ZEROS, as_text, commands
from .markdown import number
from .model_facts import Facts, field

REASONS = 6  # reasons for leaving a layer dense that a card lists, the most frequent first


def render(facts: Facts, *, metadata: str, title: str, base: str | None, plot: str | None) -> str:
    """Returns the whole card.

    Args:
        facts: of the folder.
        metadata: YAML, without its rulers.
        title: the model's name, as the Hub takes it.
        base: the dense model's Hub id, if it has one.
        plot: the picture's file name; None puts a table in its place.

    Raises:
        ValueError: damaged numbers in the plan's certificate, in a transferred plan's or in those by source.
    """
    context = _context(facts) | {
        "metadata": Markup(metadata),
        "title": Markup(title),
        "path": Markup(title if "/" in title else f"path/to/{title}"),
        "base": Markup(base) if base else None,
        "plot": plot,
        "grid": None if plot else _grid(facts),
    }
    text = _environment().get_template("card_template.md").render(context)
    return markdown.without_empty_lines(text).strip() + "\n"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_code_unless_markup,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {name: _marked(function) for name, function in FILTERS.items()}
    return environment


def _code_unless_markup(value: Any) -> Any:
    return value if isinstance(value, (Markup, Undefined)) else Markup(markdown.code(value))


def _marked(function: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *arguments: Markup(function(*arguments))


def _interval(measured: Interval, style: str = "decimals") -> str:
    show: Callable[[float], str] = {
        "decimals": markdown.decimals,
        "percent": markdown.percent,
        "signed": "{:+.3f}".format,
    }[style]
    if measured.low is None or measured.high is None:
        return show(measured.value)
    return f"{show(measured.value)} [{show(measured.low)}, {show(measured.high)}]"


def _score(score: Score) -> str:
    return f"{score.value:.3f}" + (f" ± {score.stderr:.3f}" if score.stderr is not None else "")


def _confidence(level: Any) -> str:
    return f"{100 * level:g} %" if isinstance(level, (int, float)) and 0 < level < 1 else "confidence"


def _units(unit: str) -> str:
    plural = markdown.slug(unit)
    return plural if plural.endswith("s") else f"{plural}s"


def _count(value: Any) -> str:
    """Returns a number with its thousands apart, and anything else as a code span."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return markdown.code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value.is_integer() else f"{value:g}"


def _cited(algorithm: CitedAlgorithm) -> str:
    return f"[{algorithm.name}]({algorithm.paper})" if algorithm.paper else markdown.code(algorithm.name)


# Each returns Markdown. `plain` is for what the package itself wrote; all others take anything from a checkpoint.
FILTERS: dict[str, Callable[..., str]] = {
    "block": markdown.block,
    "cell": lambda value: markdown.code(value).replace("|", "\\|"),
    "cited": _cited,
    "confidence": _confidence,
    "count": _count,
    "decimals": markdown.decimals,
    "interval": _interval,
    "loss": "{:.3f}".format,
    "megabytes": markdown.megabytes,
    "percent": markdown.percent,
    "plain": str,
    "score": _score,
    "units": _units,
}


# ---- what the template prints


@dataclass(frozen=True)
class CitedAlgorithm:
    """An algorithm of the plan: its `role` in the config, its hyperparameters as text, and where it is published.

    `paper` is an address on arXiv that has a BibTeX entry, `address` one that has none. `chooses` is True for a race or
    search, which compares plans of several allocators.
    """

    role: str
    name: str
    settings: str
    paper: str | None
    address: str | None
    chooses: bool


@dataclass(frozen=True)
class Certificate:
    """A plan against uniform sparsity. `pays` is None where the two cannot be told apart."""

    compared: Comparison
    winner: str = ""
    made_on: str = ""
    pays: bool | None = None


@dataclass(frozen=True)
class Training:
    """One training of the weights that are left; what is not recorded, or recorded as something else, is None.

    `loss` and `evaluation` are {"before", "after"} in nats a token: on held-out sequences of the text, and on the data that
    whoever trained it evaluated on.
    """

    method: str
    steps: int | None
    tokens: int | None
    teacher: bool
    heldout: Any
    loss: dict[str, float] | None
    evaluation: dict[str, float] | None
    settings: str
    data: Any
    versions: str


def _context(facts: Facts) -> dict[str, Any]:
    """Returns everything that the template names, but for the picture and what only people know."""
    texts, report = facts.metrics.texts, facts.report
    algorithms = [_cite(facts, role, name) for role, name in facts.algorithms]
    lines = commands(facts)
    words = {word for command in lines for text in command for word in (BASE, TEXT, ZEROS) if word in text}
    meanings = {
        BASE: "the dense model",
        TEXT: "the text, whose name is not recorded",
        ZEROS: "the sparse model whose zeros these are",
    }
    ignored = facts.plan.config.get("ignore")
    return {
        "facts": facts,
        "config": facts.plan.config,
        "algorithms": algorithms,
        "compared": next((text for text in texts if text.against is not None), None),
        "harnesses": sorted({task.harness for task in facts.metrics.tasks}),
        "sources": facts.sources,
        "refit": _refit(facts),
        "certificate": _certificate(facts),
        "revalidation": _revalidation(facts),
        "model_class": _model_class(facts),
        "has_processor": facts.task in ("image-text-to-text", "automatic-speech-recognition"),
        "commands": as_text(lines),
        "placeholders": {word: meaning for word, meaning in meanings.items() if word in words},
        "ignored": ", ".join(map(str, ignored)) if isinstance(ignored, list) else ignored,
        "versions": _versions({**facts.plan.versions, **_mapping(facts.pruned.get("versions"))}),
        "trainings": [_training(record) for record in facts.recoveries],
        "trained_otherwise": any(record.get("method") not in RECOVER for record in facts.recoveries),
        "grouped": any(layer.pattern != "unstructured" for layer in facts.plan.layers.values()),
        "text_names": list(dict.fromkeys(text.name for text in texts)),
        "skipped": _reasons(report.skipped.values()) if report else [],
        "notes": list(report.notes.items()) if report else [],
        "papers": _papers(facts),
        "unknown_algorithms": [name for role, name in facts.algorithms if name not in {*TABLES[role], *CHOOSERS}],
    }


def _reasons(reasons: Iterable[Any]) -> list[tuple[str, int]]:
    """Returns the most frequent reasons for leaving layers dense; files that were left out are no layers."""
    return Counter(reason for reason in map(str, reasons) if reason != LEFT_OUT).most_common(REASONS)


def _cite(facts: Facts, role: str, name: str) -> CitedAlgorithm:
    settings = _mapping(facts.plan.config.get(role))
    ours = TABLES[role].get(name)
    paper = ours.citation if ours else None
    return CitedAlgorithm(
        role,
        name,
        ", ".join(f"{key}={value}" for key, value in settings.items() if key != "name"),
        paper.url if paper else None,
        ours.paper if ours and not paper and ours.paper else None,
        role == "allocator" and name in CHOOSERS,
    )


def _grid(facts: Facts) -> Grid | None:
    try:
        return make_grid(facts.plan, facts.report)
    except ValueError:  # more blocks than anyone can look at
        return None


def _refit(facts: Facts) -> dict[str, Any] | None:
    """Returns what a refit did to the outputs of the layers, and whether weights were exchanged first; None without one."""
    if not facts.plan.config.get("refit"):
        return None
    layers = facts.report.layers.values() if facts.report else ()
    pairs = [
        (x.error_before_refit, x.error) for x in layers if x.error_before_refit is not None and x.error is not None
    ]
    means = [sum(number(one, "the report's error") for one in side) / len(pairs) for side in zip(*pairs, strict=True)]
    return {
        "swaps": facts.plan.config.get("refine") == "swaps",
        "given": bool(facts.pruned.get("given")),
        "errors": means,
    }


def _certificate(facts: Facts) -> Certificate | None:
    """Returns what the plan gains over uniform on text that did not choose it; None unless a race or a search did."""
    chosen = facts.plan.chosen
    if chosen is None:
        return None
    return Certificate(Comparison.from_dict(field(chosen, "certificate")), winner=str(field(chosen, "winner")))


def _revalidation(facts: Facts) -> Certificate | None:
    """Returns what a plan that was made on another model gains over uniform on this one; None for other plans."""
    checked = facts.pruned.get("revalidation")
    if checked is None:
        return None
    made_on, pays = str(field(checked, "made_on") or "another model"), field(checked, "pays")
    return Certificate(Comparison.from_dict(checked), made_on=made_on, pays=pays if isinstance(pays, bool) else None)


def _model_class(facts: Facts) -> str:
    """The class of transformers that loads the model with its head: where it is no causal LM's, the recorded one."""
    if facts.task == "text-generation" or facts.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    return facts.architecture if facts.task else "AutoModel"


def _training(record: Mapping[str, Any]) -> Training:
    steps, tokens = (x if isinstance(x, int) else None for x in (record.get("steps"), record.get("tokens")))
    by_us = record.get("method") in RECOVER  # then the command says with which options
    options = {} if by_us else _mapping(record.get("options"))
    return Training(
        method=str(record.get("method")),
        steps=steps,
        tokens=tokens,
        teacher=bool(record.get("teacher")),
        heldout=_mapping(record.get("data")).get("heldout"),
        loss=_before_and_after(record.get("loss")),
        evaluation=_before_and_after(record.get("evaluation")),
        settings=", ".join(f"{key}={value}" for key, value in options.items()),
        data=record.get("data"),
        versions=_versions(_mapping(record.get("versions"))),
    )


def _before_and_after(values: Any) -> dict[str, float] | None:
    measured = {when: _mapping(values).get(when) for when in ("before", "after")}
    numbers = (isinstance(x, (int, float)) and abs(x) < math.inf for x in measured.values())
    return measured if all(numbers) else None  # type: ignore[return-value]


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"


def _papers(facts: Facts) -> str:
    """Returns the BibTeX of every algorithm and every way of training that has an entry."""
    citations = [TABLES[role][name].citation for role, name in facts.algorithms if name in TABLES[role]]
    methods = [str(record.get("method")) for record in facts.recoveries] + ["reconstruct"] * facts.reconstructed
    citations += [PAPERS[key] for method in methods for key in RECOVERY.get(method, ())]
    return "\n\n".join(paper.bibtex() for paper in dict.fromkeys(citations) if paper)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
