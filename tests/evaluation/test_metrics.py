"""The record of evaluations: it comes back as it was, and an altered one is an error."""

from __future__ import annotations

import json

import pytest

from hf_sparsity.evaluation.evaluate import evaluate
from hf_sparsity.evaluation.metrics import Interval, Metrics
from hf_sparsity.evaluation.texts import Text
from tests.evaluation.models import DOCUMENTS


def test_altered_records_are_errors(folders, tmp_path):
    good = evaluate(folders[0], texts=Text("mine", DOCUMENTS), against=folders[1], length=16, windows=2).to_dict()
    assert Metrics.from_dict(json.loads(json.dumps(good))).to_dict() == json.loads(json.dumps(good))
    assert Metrics.load(tmp_path) == Metrics()
    for change in (
        lambda d: d.update(version=2),
        lambda d: d.pop("tasks"),
        lambda d: d["texts"][0].pop("length"),
        lambda d: d["texts"][0].update(extra=1),
        lambda d: d["texts"][0].update(name=["a"]),
        lambda d: d["texts"][0].update(windows=1.5),
        lambda d: d["texts"][0]["perplexity"].update(value="12"),
        lambda d: d["texts"][0]["perplexity"].update(value=float("nan")),
        lambda d: d["texts"][0]["against"].update(kl=None),
        lambda d: d.update(texts={"a": 1}),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"bad\.json: "):
            Metrics.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="finite"):
        Interval(float("inf"))
