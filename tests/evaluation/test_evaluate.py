"""`evaluate`: what it measures, against brute force, and what it records."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_sparsity import save_sparse
from hf_sparsity.evaluation.evaluate import evaluate
from hf_sparsity.evaluation.metrics import METRICS_FILE, Metrics
from hf_sparsity.evaluation.perplexity import score_windows
from hf_sparsity.evaluation.texts import Text, cut
from tests.evaluation.models import DOCUMENTS, small, sparse


def test_evaluate_records_what_it_measured(folders):
    folder, dense = folders
    (record,) = evaluate(folder, texts=Text("mine", DOCUMENTS), against=dense, length=16).texts
    assert (record.name, record.split, record.length, record.unit, record.documents) == (
        "mine",
        None,
        16,
        "document",
        10,
    )
    assert record.predictions == 15 * record.windows and record.against.name == "dense"
    assert record.weights != record.against.weights
    measured = record.against
    assert measured.ratio.value == pytest.approx(record.perplexity.value / measured.perplexity.value)
    for one in (record.perplexity, measured.perplexity, measured.ratio, measured.kl, measured.top1):
        assert one.low < one.value < one.high
    assert Metrics.load(folder) == Metrics(texts=(record,))
    # The same again takes its place; another length and no comparison stand beside it.
    evaluate(folder, texts=Text("mine", DOCUMENTS), against=dense, length=16, windows=20)
    evaluate(folder, texts=Text("mine", DOCUMENTS), length=16, resamples=50)
    evaluate(folder, texts=Text("mine", DOCUMENTS), length=8, record=False)
    stored = Metrics.load(folder).texts
    assert [(r.windows, r.against is None) for r in stored] == [(20, False), (record.windows, True)]


def test_the_paired_interval_is_the_brute_force_one(folders):
    folder, dense = folders
    found = evaluate(
        folder, texts=Text("mine", DOCUMENTS), against=dense, length=16, resamples=400, record=False
    ).texts[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = cut(Text("mine", DOCUMENTS), tokenizer, 16)
    scores = score_windows(sparse(), pieces.ids, small())
    rng, ratios = np.random.default_rng(7), []
    for _ in range(4000):
        chosen = np.concatenate([np.flatnonzero(pieces.units == unit) for unit in rng.integers(10, size=10)])
        ratios.append(math.exp((scores.loss[chosen].sum() - scores.reference[chosen].sum()) / (15 * len(chosen))))
    low, high = np.quantile(ratios, [0.025, 0.975])
    width = high - low
    assert found.against.ratio.low == pytest.approx(low, abs=width / 8)
    assert found.against.ratio.high == pytest.approx(high, abs=width / 8)


def test_a_packed_folder_scores_the_same_and_a_dense_one_records_nothing(folders, tokenizer, tmp_path, caplog):
    folder, dense = folders
    save_sparse(sparse(), tmp_path / "packed", layout="bitmask", tokenizer=tokenizer)
    one, packed = (evaluate(f, texts=Text("mine", DOCUMENTS), length=16) for f in (folder, tmp_path / "packed"))
    assert one == packed and Metrics.load(tmp_path / "packed") == packed
    with caplog.at_level(logging.WARNING):
        evaluate(dense, texts=Text("mine", DOCUMENTS), length=16, windows=1)
    assert "not a sparse model's folder" in caplog.text and not (dense / METRICS_FILE).exists()
    loaded = evaluate(small(), texts=Text("mine", DOCUMENTS), length=16, windows=1, tokenizer=tokenizer)
    assert loaded.texts[0].perplexity.low is None  # one window: nothing to draw from


def test_mistakes_are_said_before_the_work(folders, tokenizer, tmp_path):
    folder, _ = folders
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(folder)
    with pytest.raises(ValueError, match="resamples=0 must be a whole number, at least 1"):
        evaluate(folder, texts="x.txt", resamples=0)
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate(small(), texts=Text("mine", DOCUMENTS))
    broken = small()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite on mine"):
        evaluate(broken, texts=Text("mine", DOCUMENTS), length=16, tokenizer=tokenizer)
    save_sparse(sparse(), tmp_path / "damaged", tokenizer=tokenizer)
    (tmp_path / "damaged" / METRICS_FILE).write_text('{"version": 1, "texts": [')
    with pytest.raises(ValueError, match=f"{METRICS_FILE} is truncated or not JSON"):
        evaluate(tmp_path / "damaged", texts=Text("mine", DOCUMENTS), length=16)
    assert (tmp_path / "damaged" / METRICS_FILE).read_text() == '{"version": 1, "texts": ['
