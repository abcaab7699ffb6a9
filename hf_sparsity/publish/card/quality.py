"""The model card's section on quality: dense against sparse, as it was recorded."""

from __future__ import annotations

from typing import Any

from ...evaluation.metrics import Score, TaskRecord, TextRecord
from ...records import Interval
from .markdown import code, decimals, number, percent, slug, table
from .model_facts import Facts, field


def quality(facts: Facts) -> str:
    """Dense against sparse on every text and task that was recorded."""
    metrics = facts.metrics
    if not metrics.texts and not metrics.tasks:
        return (
            "Nobody has evaluated this model, or the results were not recorded. Zeros cost quality: measure before you rely on "
            f"it, for example with {code('hf-sparsity eval FOLDER --text TEXT --against DENSE_MODEL')}."
        )
    parts = [_text(text) for text in metrics.texts]
    if metrics.tasks:
        parts.append(_tasks(metrics.tasks))
    return "\n\n".join(parts)


def by_source(facts: Facts) -> list[str]:
    """Of a model pruned on a calibration mix: how far it departs from the dense one on each source; else nothing."""
    sources = facts.report.sources if facts.report is not None else {}
    if not sources:
        return []
    rows = []
    for name, one in sources.items():
        share, sequences, kl = (number(field(one, key), f"the report's {key}") for key in ("weight", "sequences", "kl"))
        perplexity = [number(field(one, "perplexity", key), "the report's perplexity") for key in ("dense", "pruned")]
        rows.append([code(name), percent(share), f"{sequences:,.0f}", decimals(kl), *map(decimals, perplexity)])
    header = ["source", "share", "sequences", "KL from the dense model, nats a token", "perplexity, dense", "pruned"]
    return [
        "## Source by source",
        "The calibration text was a mix. On sequences of each source that were kept apart, right after pruning:",
        table(header, rows),
    ]


def _text(text: TextRecord) -> str:
    split = f", split {code(text.split)}" if text.split else ""
    lines = [
        f"**{code(text.name)}**{split}: {text.predictions:,} next-token predictions in {text.windows:,} windows of "
        f"{text.length:,} tokens."
    ]
    against = text.against
    if against is None:
        lines += [
            table(["", "this model"], [["perplexity", interval(text.perplexity)]]),
            "The dense model was not measured.",
        ]
    else:
        rows = [
            ["perplexity (lower is better)", interval(against.perplexity), interval(text.perplexity)],
            ["its ratio to the dense model's", "1", interval(against.ratio)],
            ["divergence from the dense model (KL, nats a token)", "0", interval(against.kl)],
            ["same most likely next token as the dense model", "100 %", interval(against.top1, share=True)],
        ]
        lines.append(table(["", "dense", "this model"], rows))
    if text.perplexity.low is not None:
        paired = ", the same draws for both models" if against is not None else ""
        lines.append(
            f"In brackets: {_confidence(text.confidence)} intervals, by bootstrap over {text.documents:,} {_units(text.unit)} "
            f"({text.resamples:,} resamples, seed {text.seed}{paired})."
        )
    return "\n\n".join(lines)


def _units(unit: str) -> str:
    plural = slug(unit)
    return plural if plural.endswith("s") else f"{plural}s"


def _tasks(tasks: tuple[TaskRecord, ...]) -> str:
    rows = []
    for task in tasks:
        against = task.against
        for metric, score in task.metrics.items():
            dense = against.metrics.get(metric) if against else None
            change = against.difference.get(metric) if against else None
            limit = f" (the first {task.limit:g})" if isinstance(task.limit, (int, float)) and task.limit else ""
            rows.append(
                [
                    f"{code(task.name)}, {task.shots} shots, {task.samples:,} samples{limit}",
                    code(metric),
                    _score(dense) if dense else "not measured",
                    _score(score),
                    interval(change, signed=True) if change else "",
                ]
            )
    harness = ", ".join(sorted({code(task.harness) for task in tasks}))
    level = _confidence(tasks[0].confidence)
    return (
        table(["task", "metric", "dense", "this model", "difference"], rows)
        + f"\n\nBy lm-evaluation-harness {harness}; ± is the standard error, in brackets a {level} interval of the difference."
    )


def interval(measured: Interval, *, share: bool = False, signed: bool = False) -> str:
    """Returns the value, and in brackets its interval if it has one: as a number, a percentage or a signed number."""

    def shown(value: float) -> str:
        return percent(value) if share else f"{value:+.3f}" if signed else decimals(value)

    if measured.low is None or measured.high is None:
        return shown(measured.value)
    return f"{shown(measured.value)} [{shown(measured.low)}, {shown(measured.high)}]"


def _score(score: Score) -> str:
    return f"{score.value:.3f}" + (f" ± {score.stderr:.3f}" if score.stderr is not None else "")


def _confidence(level: Any) -> str:
    return f"{100 * level:g} %" if isinstance(level, (int, float)) and 0 < level < 1 else "confidence"
