"""Perplexity, its intervals and its record."""

from __future__ import annotations

import json
import logging
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_sparsity import demo, evaluate_text, save_sparse
from hf_sparsity.core import bootstrap
from hf_sparsity.evaluation.evaluate import evaluate
from hf_sparsity.evaluation.metrics import METRICS_FILE, Interval, Metrics
from hf_sparsity.evaluation.perplexity import next_token_loss, score_windows, text_windows
from hf_sparsity.evaluation.resampling import Resampling
from hf_sparsity.evaluation.texts import Text, cut, read_text
from tests.evaluation.models import DOCUMENTS, small, sparse


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.PATH)


# ---- the bootstrap


def perplexity(sums):
    return np.exp(sums[..., 1] / sums[..., 0])


def resample(sums, resamples, seed):
    return bootstrap.resampled_sums(torch.from_numpy(sums), resamples=resamples, seed=seed).numpy()


def documents(rng, count=60):
    """(predictions, loss) of documents of unequal length, some harder than others; the true perplexity is e²."""
    predictions = rng.integers(50, 150, count)
    return np.stack([predictions, predictions * rng.normal(2, 0.4, count)], axis=1).astype(float)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for repetition in range(300):
        sums = documents(rng)
        found = Resampling(sums, 300, seed=repetition).interval(perplexity)
        hits += found.low <= math.exp(2) <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_pairing_makes_the_comparison_sharper():
    """The same documents are hard for both models, which a paired ratio does not see."""
    rng = np.random.default_rng(0)
    sums = documents(rng)
    sums = np.column_stack([sums, sums[:, 1] + sums[:, 0] * rng.normal(0.3, 0.05, len(sums))])
    paired = Resampling(sums, 1000, 0).interval(lambda s: np.exp((s[..., 2] - s[..., 1]) / s[..., 0]))
    one, other = perplexity(resample(sums[:, :2], 1000, 1)), perplexity(resample(sums[:, [0, 2]], 1000, 2))
    low, high = np.quantile(other / one, [0.025, 0.975])
    assert paired.low < math.exp(0.3) < paired.high
    assert paired.high - paired.low < (high - low) / 3


def test_a_resample_is_as_many_units_drawn_together(monkeypatch):
    sums = np.array([[1.0, 1, 10], [1, 2, 20], [1, 4, 40]])
    drawn = resample(sums, 500, seed=3)
    assert drawn.shape == (500, 3)
    assert (drawn[:, 0] == 3).all() and np.array_equal(drawn[:, 2], 10 * drawn[:, 1])
    assert set(drawn[:, 1]) == {3, 4, 5, 6, 7, 8, 9, 10, 12}  # all sums of three of 1, 2, 4, with replacement
    assert np.array_equal(drawn, resample(sums, 500, seed=3)) and not np.array_equal(drawn, resample(sums, 500, seed=4))
    monkeypatch.setattr(bootstrap, "DRAWN", 10)  # in many steps, the last of them smaller
    pieces = resample(sums, 500, seed=3)
    assert pieces.shape == (500, 3) and (pieces[:, 0] == 3).all() and set(pieces[:, 1]) == set(drawn[:, 1])


def test_one_unit_has_no_interval():
    assert Resampling(np.array([[2.0, 2.0]])).interval(perplexity) == Interval(math.e, None, None)


# ---- texts


def test_windows_that_begin_in_one_document_are_one_unit(tokenizer):
    joiner = " # and now for something else\n" * 3
    found = cut(Text("mine", DOCUMENTS, joiner=joiner), tokenizer, 16)
    joined = joiner.join(DOCUMENTS)
    assert torch.equal(found.ids, text_windows(joined, tokenizer, 16)) and found.unit == "document"
    starts = [len(tokenizer.decode(found.ids[:i].flatten())) for i in range(len(found.ids))]
    boundaries = [joined.index(f"class Thing{i}:") for i in range(10)]
    owners = [max(i for i, boundary in enumerate(boundaries) if boundary <= start) for start in starts]
    assert list(found.units) == owners and set(owners) == set(range(10))


@pytest.mark.parametrize("text", [["".join(DOCUMENTS)], DOCUMENTS[:7], ["short\n"] * 400])
def test_few_or_short_documents_leave_windows_as_units(tokenizer, text):
    found = cut(Text("mine", text), tokenizer, 16)
    assert found.unit == "window" and list(found.units) == list(range(len(found.ids)))


def test_windows_are_limited_and_too_little_text_is_an_error(tokenizer):
    assert len(cut(Text("mine", DOCUMENTS), tokenizer, 16, 3).ids) == 3
    assert len(cut(Text("mine", DOCUMENTS, windows=5), tokenizer, 16, 30).ids) == 5
    with pytest.raises(ValueError, match="mine has 2 tokens, fewer than one window of 16"):
        cut(Text("mine", ["a b"]), tokenizer, 16)


PAPERS = {
    "wikitext2": ("Salesforce/wikitext", "test", "text", "\n\n", None),
    "WikiText-2": ("Salesforce/wikitext", "test", "text", "\n\n", None),
    "c4": ("allenai/c4", "validation", "text", " ", 256),
    "ptb": ("ptb-text-only/ptb_text_only", "test", "sentence", " ", None),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_texts_are_joined_as_in_the_papers(monkeypatch, tokenizer, name):
    path, split, column, joiner, limit = PAPERS[name]
    asked = {}

    def hub(**arguments):
        asked.update(arguments)
        return ({column: text} for text in ["", "one", "", *["two"] * 2000])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    text = read_text(name)
    assert (asked["path"], asked["split"], text.split, text.joiner, text.windows) == (path, split, split, joiner, limit)
    assert text.documents[:4] == ["", "one", "", "two"] and len(text.documents) == (1100 if name == "c4" else 2003)
    assert text.name == ("wikitext2" if "iki" in name else name) and text.special
    with pytest.raises(ValueError, match=f"split '{split}', not 'train'"):
        read_text(name, split="train")


@pytest.mark.parametrize("name", [*PAPERS, "someone/corpus"])
def test_without_a_network_the_error_says_so(name):
    with pytest.raises(ValueError, match=r"could not be reached|could be reached"):
        read_text(name)


def test_local_files_keep_their_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    assert read_text(str(tmp_path / "a.jsonl")) == Text("a.jsonl", DOCUMENTS)
    assert read_text(str(tmp_path / "a.txt")) == Text("a.txt", ["".join(DOCUMENTS)])


# ---- scores


def test_window_sums_are_the_definitions(tokenizer):
    model, dense = sparse(), small()
    ids = text_windows("\n\n".join(DOCUMENTS), tokenizer, 32)[:3]
    scores = score_windows(model, ids, dense)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    loss, reference = (-x.gather(2, ids[:, 1:, None]).sum((1, 2)) for x in (q, p))
    assert list(scores.predictions) == [31, 31, 31]
    np.testing.assert_allclose(scores.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(scores.reference, reference, rtol=1e-5)
    np.testing.assert_allclose(scores.kl, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(scores.same, (p.argmax(-1) == q.argmax(-1)).sum(1))
    quality = evaluate_text(model, ids, dense)
    assert quality.tokens == 93 and quality.perplexity == pytest.approx(math.exp(loss.sum() / 93), rel=1e-5)
    assert quality.kl == pytest.approx(scores.kl.sum() / 93) and quality.top1 == pytest.approx(scores.same.sum() / 93)
    with torch.no_grad():
        assert next_token_loss({"input_ids": ids}, model(ids).logits) == (
            pytest.approx(float(loss.sum()), rel=1e-5),
            93,
        )


# ---- the call and its record


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """(a sparse model's folder, the dense one's)."""
    path = tmp_path_factory.mktemp("folders")
    save_sparse(sparse(), path / "sparse", tokenizer=tokenizer)
    small().save_pretrained(path / "dense")
    tokenizer.save_pretrained(path / "dense")
    return path / "sparse", path / "dense"


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
