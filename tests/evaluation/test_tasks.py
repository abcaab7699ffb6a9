"""Tasks of lm-evaluation-harness: local ones, run for real on a random model."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_sparsity import demo
from hf_sparsity.evaluation.evaluate import evaluate
from hf_sparsity.evaluation.metrics import Metrics
from hf_sparsity.evaluation.tasks import find_tasks, score_tasks
from hf_sparsity.model.fingerprint import weights_fingerprint
from tests.evaluation.local_task import ROWS, TASK
from tests.evaluation.models import small, sparse

pytest.importorskip("lm_eval")

GROUP = """
group: both
task: [next_line, other_line]
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks on the same kind of documents, and a group of them."""
    path = tmp_path_factory.mktemp("tasks")
    for name, rows in (("next_line", ROWS), ("other_line", ROWS[:10])):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (path / f"{name}.yaml").write_text(TASK.format(name=name, data=path / f"{name}.jsonl"))
    (path / "both.yaml").write_text(GROUP)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.PATH)


def right(model, tokenizer, rows=ROWS):
    """Whether the model likes the right choice best, document by document."""
    found = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before = tokenizer(row["before"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([tokenizer(row["before"] + choice, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            scores.append(float(logs[len(before) - 1 :].sum()))
        found.append(float(np.argmax(scores) == row["right"]))
    return np.array(found)


def test_a_local_task_is_scored_and_compared_over_its_documents(folder, tokenizer, capsys):
    model, dense = sparse(), small()
    ours, theirs = right(model, tokenizer), right(dense, tokenizer)
    assert 0 < ours.mean() < 1 and (ours != theirs).any()
    tasks = find_tasks(["next_line"], folder)
    model.train()
    (record,) = score_tasks(model, tokenizer, tasks, ("dense", dense))
    assert model.training and tokenizer.pad_token is None  # as they were
    assert capsys.readouterr().out == ""
    assert (record.name, record.version, record.samples, record.shots, record.limit) == ("next_line", 2.0, 30, 0, None)
    assert record.metrics["acc"].value == pytest.approx(ours.mean())
    assert record.metrics["acc"].stderr == pytest.approx(ours.std(ddof=1) / 30**0.5)
    assert record.against.metrics["acc"].value == pytest.approx(theirs.mean())
    assert (record.weights, record.against.weights) == (weights_fingerprint(model), weights_fingerprint(dense))
    # The Brier score is no mean of the documents' scores, so its difference has no interval of this kind.
    assert record.metrics.keys() == {"acc", "brier_score"} and record.against.difference.keys() == {"acc"}
    difference = record.against.difference["acc"]
    assert difference.value == pytest.approx((ours - theirs).mean())
    rng = np.random.default_rng(1)
    low, high = np.quantile([(ours - theirs)[rng.integers(30, size=30)].mean() for _ in range(4000)], [0.025, 0.975])
    assert difference.low == pytest.approx(low, abs=0.035) and difference.high == pytest.approx(high, abs=0.035)


def test_limits_groups_and_their_records(folder, tokenizer):
    model = sparse()
    (record,) = evaluate(
        model, tasks=["both"], include_path=folder, tokenizer=tokenizer, against=small(), limit=20.0
    ).tasks
    ours = np.concatenate([right(model, tokenizer, ROWS[:20]), right(model, tokenizer, ROWS[:10])])
    assert (record.name, record.samples, record.limit) == ("both", 30, 20) and isinstance(record.limit, int)
    assert record.metrics["acc"].value == pytest.approx(ours.mean())
    assert record.against.difference["acc"].low <= record.against.difference["acc"].value
    metrics = Metrics(tasks=(record,))
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    assert len(metrics.updated(metrics).tasks) == 1


def test_unknown_tasks_get_suggestions(folder, monkeypatch):
    """Only the folder is searched here: the harness needs twenty seconds to read its own thousands of task files."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: TaskManager(**given | {"include_defaults": False}))
    with pytest.raises(ValueError, match="no task 'next_lime'; did you mean next_line"):
        find_tasks(["next_lime"], folder)


def test_a_missing_harness_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_sparsity\[eval\]'"):
        find_tasks(["arc_easy"])


def test_a_task_has_its_own_number_of_examples(tmp_path, tokenizer):
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    text = TASK.format(name="shown", data=tmp_path / "shown.jsonl") + "num_fewshot: 2\nfewshot_split: test\n"
    (tmp_path / "shown.yaml").write_text(text)
    tasks, model = find_tasks(["shown"], tmp_path), small()
    assert [score_tasks(model, tokenizer, tasks, shots=shots, limit=2)[0].shots for shots in (None, 0)] == [2, 0]


def test_the_seed_is_that_of_all_the_harness_draws(folder, tokenizer, monkeypatch):
    given = {}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **options: given.update(options) or {}["no results"])
    with pytest.raises(ValueError, match="no results"):
        score_tasks(small(), tokenizer, find_tasks(["next_line"], folder), seed=7)
    assert {given[f"{who}_seed"] for who in ("random", "numpy_random", "torch_random", "fewshot_random")} == {7}


@pytest.mark.parametrize("where", ["task.yaml", "_shared", "deep/er/task.yml"])
@pytest.mark.parametrize("code", ["process_docs: !function utils.run", "class: utils.Task"])
def test_task_files_import_python_only_when_trusted(tmp_path, where, code):
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"task: mine\ndataset_path: json\n{code}\n")
    marker = tmp_path / "ran"
    for place in {path.parent, tmp_path}:
        (place / "utils.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(docs): return docs\n")
    (tmp_path / "plain.yaml").write_text(TASK.format(name="plain", data="none.jsonl"))
    with pytest.raises(ValueError, match="imports Python"):
        find_tasks(["plain"], tmp_path)
    assert find_tasks(["plain"], tmp_path, trust_remote_code=True).names == ("plain",)
    assert not marker.exists()


def test_tasks_that_run_what_the_model_writes_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(TASK.format(name="writes", data="none.jsonl") + "unsafe_code: true\n")
    (tmp_path / "g.yaml").write_text("group: coding\ntask: [writes]\n")
    with pytest.raises(ValueError, match="'writes' runs code that the model writes"):
        find_tasks(["coding"], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0 must be .*documents"),
        ({"shots": -1}, "shots=-1 must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
    ],
)
def test_impossible_numbers_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate("a folder", tasks="arc_easy", **options)


def test_data_that_are_not_there(tmp_path, tokenizer):
    (tmp_path / "a.yaml").write_text(TASK.format(name="empty", data=tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"tasks empty cannot be run: .*none\.jsonl"):
        evaluate(small(), tasks="empty", include_path=tmp_path, tokenizer=tokenizer)
