"""What is read from the harness' results, written by hand as it gives them."""

from __future__ import annotations

import numpy as np

from hf_sparsity.evaluation.metrics import Interval, Score
from hf_sparsity.evaluation.task_results import differences, prompt_examples, shown, task_scores


def test_a_group_without_a_score_shows_its_tasks():
    results = {
        "results": {
            "group": {"name": "group", " ": " "},
            "a": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
            "b": {"f1,strict": 1},
        },
        "group_subtasks": {"group": ["a", "b"]},
        "n-shot": {"a": 0, "b": 5},
    }
    assert shown(results) == ["a", "b"] and prompt_examples(results, "group") == 5
    assert task_scores(results, "a") == {"acc": Score(0.5, None)}
    assert task_scores(results, "b") == {"f1,strict": Score(1.0, None)}


def test_one_document_has_no_interval():
    one = {
        "results": {"a": {"acc,none": 1.0}},
        "group_subtasks": {},
        "samples": {"a": [{"doc_id": 0, "doc_hash": "x", "filter": "none", "metrics": ["acc"], "acc": 1.0}]},
    }
    assert differences(one, one, "a", 100, 0) == {"acc": Interval(0.0)}


def test_a_metric_that_is_no_mean_has_no_interval():
    """Perplexity is the exponential of one: the harness keeps each document's loss under its name."""
    samples = [
        {
            "doc_id": i,
            "doc_hash": "x",
            "filter": "none",
            "metrics": ["acc", "perplexity"],
            "acc": i % 2,
            "perplexity": -i,
        }
        for i in range(4)
    ]
    results = {
        "results": {"a": {"acc,none": 0.5, "perplexity,none": float(np.exp(1.5))}},
        "group_subtasks": {},
        "samples": {"a": samples},
    }
    assert differences(results, results, "a", 100, 0).keys() == {"acc"}
