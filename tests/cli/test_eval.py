"""`hf-sparsity eval`, as a user types it."""

from __future__ import annotations

import json
import logging

import pytest
from transformers import AutoTokenizer

from hf_sparsity import demo, save_sparse
from hf_sparsity.cli.main import main
from hf_sparsity.evaluation.metrics import METRICS_FILE, Metrics
from tests.evaluation.local_task import ROWS, TASK
from tests.evaluation.models import DOCUMENTS, small, sparse


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A sparse and a dense folder, a text and a task."""
    path = tmp_path_factory.mktemp("eval")
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    save_sparse(sparse(), path / "sparse", tokenizer=tokenizer)
    small().save_pretrained(path / "dense")
    tokenizer.save_pretrained(path / "dense")
    (path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    (path / "code").mkdir()
    (path / "code" / "mine.yaml").write_text("task: mine\ndataset_path: json\nclass: utils.Task\n")
    (path / "tasks").mkdir()
    (path / "tasks" / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (path / "tasks" / "a.yaml").write_text(TASK.format(name="next_line", data=path / "tasks" / "a.jsonl"))
    return path


def run(capsys, *arguments, code=0):
    assert main(["eval", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_texts_and_tasks_in_one_go_are_recorded(capsys, work):
    pytest.importorskip("lm_eval")
    folder, text = work / "sparse", work / "text.jsonl"
    tasks = ["--tasks", "next_line", "--include-path", work / "tasks", "--limit", "12", "--shots", "1"]
    texts = ["--text", text, "--text", __file__, "--length", "16", "--seed", "3", "--resamples", "200"]
    shown = json.loads(run(capsys, folder, "--against", work / "dense", *texts, *tasks, "--json").out)
    assert {(record["seed"], record["resamples"]) for record in shown["texts"] + shown["tasks"]} == {(3, 200)}
    assert [t["name"] for t in shown["texts"]] == ["text.jsonl", "test_eval.py"]
    assert [t["documents"] for t in shown["texts"]] == [10, shown["texts"][1]["windows"]]
    assert shown["tasks"][0]["samples"] == 12 and shown["tasks"][0]["limit"] == 12
    assert shown["tasks"][0]["shots"] == 1
    assert shown["recorded"] == f"{folder}/{METRICS_FILE}"
    stored = json.loads((folder / METRICS_FILE).read_text())
    assert stored == {key: shown[key] for key in ("version", "texts", "tasks")}
    table = run(capsys, folder, "--against", work / "dense", *texts, *tasks).out
    assert "KL, nats a token" in table and "bootstrap over 10 documents" in table and "recorded in" in table
    assert "next_line" in table and "difference" in table and "lm-evaluation-harness" in table
    again = Metrics.load(folder)
    assert (len(again.texts), len(again.tasks)) == (2, 1)


def test_nothing_is_recorded_unasked(capsys, work, caplog):
    before = sorted(path.name for path in work.rglob("*"))
    text = ["--text", work / "text.jsonl", "--length", "16", "--windows", "2", "--json"]
    assert json.loads(run(capsys, work / "sparse", *text, "--no-record").out)["recorded"] is None
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert json.loads(run(capsys, work / "dense", *text).out)["recorded"] is None
    assert "not a sparse model's folder: the results are shown, not recorded" in caplog.text
    assert sorted(path.name for path in work.rglob("*")) == before


def test_the_embedded_model_brings_its_text(capsys):
    (text,) = json.loads(run(capsys, "demo", "--length", "64", "--windows", "3", "--json").out)["texts"]
    assert (text["name"], text["windows"], text["length"], text["against"]) == ("demo held-out", 3, 64, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text or --tasks is missing"),
        (["--text", "wikitext2"], "wikitext2 could not be reached"),
        (["--text", "none.txt"], "none.txt"),
        (["--text", __file__, "--length", "100000"], "longer than the 128 positions"),
        (["--text", __file__, "--length", "16", "--windows", "0"], "windows=0 must be a whole number, at least 1"),
        (["--text", "text.jsonl", "--column", "words"], "words"),
        (["--tasks", "x", "--include-path", "none"], "'none' is not a folder"),
        (["--tasks", "mine", "--include-path", "code"], "allow that with --trust-remote-code"),
        (["--text", __file__, "--batch-size", "0"], "batch_size=0 must be a whole number, at least 1"),
    ],
)
def test_wrong_input_is_exit_code_2(capsys, work, arguments, message, monkeypatch):
    monkeypatch.chdir(work)
    shown = run(capsys, work / "sparse", *arguments, code=2)
    assert message in shown.err and "Traceback" not in shown.err
