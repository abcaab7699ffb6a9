"""What lm-evaluation-harness gives back, read: which scores to record, and paired differences over documents.

`results` is what `lm_eval.simple_evaluate` returned; its keys are the harness' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .metrics import Interval, Score
from .resampling import Resampling


def shown(results: Mapping[str, Any]) -> list[str]:
    """Returns the names that get a record: tasks, and a group in place of its tasks where it has a score of its own."""
    children = results["group_subtasks"]
    inner = {child for members in children.values() for child in members}

    def expand(name: str) -> list[str]:
        if name in results["results"] and task_scores(results, name):
            return [name]
        return [leaf for child in children.get(name, ()) for leaf in expand(child)]

    top = [name for name in (*results["results"], *children) if name not in inner]
    return list(dict.fromkeys(leaf for name in top for leaf in expand(name)))


def task_scores(results: Mapping[str, Any], name: str) -> dict[str, Score]:
    """Returns `{metric: score}`; the filter is part of the name unless it is "none"."""
    values = results["results"][name]
    scores = {}
    for key, value in values.items():
        metric, _, answers = key.partition(",")
        if answers and not metric.endswith("_stderr") and _is_number(value):
            stderr = values.get(f"{metric}_stderr,{answers}")
            scores[_label(metric, answers)] = Score(float(value), float(stderr) if _is_number(stderr) else None)
    return scores


def documents(results: Mapping[str, Any], name: str) -> dict[Any, dict[str, float]]:
    """Returns `{document: {metric: value}}` of a task, or of all tasks of a group."""
    if name not in results["samples"]:
        members = results["group_subtasks"].get(name, ())
        return {key: values for member in members for key, values in documents(results, member).items()}
    by_document: dict[Any, dict[str, float]] = {}
    for sample in results["samples"][name]:
        values = by_document.setdefault((name, sample["doc_id"], sample["doc_hash"]), {})
        values.update(
            {_label(m, sample["filter"]): float(sample[m]) for m in sample["metrics"] if _is_number(sample[m])}
        )
    return by_document


def differences(
    sparse: Mapping[str, Any], dense: Mapping[str, Any], name: str, resamples: int, seed: int
) -> dict[str, Interval]:
    """Returns sparse minus dense for each metric that is a mean over documents (F1, perplexity and the like are not)."""
    ours, theirs = documents(sparse, name), documents(dense, name)
    scores, others = task_scores(sparse, name), task_scores(dense, name)
    intervals = {}
    for metric in scores.keys() & others.keys():
        both = [d for d in ours if metric in ours[d] and metric in theirs.get(d, {})]
        pairs = np.array([[ours[d][metric], theirs[d][metric], 1.0] for d in both]).reshape(-1, 3)
        means = pairs.mean(axis=0) if both else ()
        if both and np.allclose(means[:2], [scores[metric].value, others[metric].value], rtol=1e-9, atol=1e-12):
            intervals[metric] = Resampling(pairs, resamples, seed).interval(
                lambda s: (s[..., 0] - s[..., 1]) / s[..., 2]
            )
    return dict(sorted(intervals.items()))


def _label(metric: str, answers: str) -> str:
    """Returns the name that a record gives a metric; `answers` is the harness' filter of what the model wrote."""
    return metric if answers == "none" else f"{metric},{answers}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_)) and math.isfinite(value)


def prompt_examples(results: Mapping[str, Any], name: str) -> int:
    """Returns the number of examples in the prompt; for a group the largest of its tasks."""
    number = results["n-shot"].get(name)
    members = results["group_subtasks"].get(name, ())
    return (
        int(number) if number is not None else max((prompt_examples(results, member) for member in members), default=0)
    )
