"""Files, folders, tables and Hub datasets in the forms that people have them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pandas
import pytest
import torch

from hf_sparsity.calibration.calibration import calibration_batches, read_texts
from tests.calibration.texts import assert_from, documents, make_tokenizer, streaming


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    """A file in the form that its name says."""
    opened = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)
    table = datasets.Dataset.from_dict({"text": rows})
    if ".parquet" in path.name or ".csv" in path.name:
        (table.to_parquet if ".parquet" in path.name else table.to_csv)(str(path))
        return path
    if ".tsv" in path.name:
        table.add_column("number", list(range(len(rows)))).to_csv(str(path), sep="\t")
        return path
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(rows) if ".txt" in path.name else "\n".join(json.dumps({"text": one}) for one in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.xz", "a.jsonl.bz2", "a.tsv"])
def test_compressed_and_tabbed_files(tokenizer, tmp_path, name):
    file = write(tmp_path / name, documents())
    assert_from(calibration_batches(file, tokenizer, sequences=8, length=32), tokenizer, documents())
    assert read_texts(str(file)) == documents()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz"])
def test_compressed_texts(tokenizer, tmp_path, name):
    write(tmp_path / name, documents())
    assert read_texts(str(tmp_path / name)) == ["\n".join(documents())]


@pytest.mark.parametrize("form", ["paths", "names", "pattern", "folder", "one name"])
def test_several_files(tokenizer, tmp_path, form):
    parts = [write(tmp_path / f"{i}.jsonl", documents()[15 * i : 15 * i + 15]) for i in range(2)]
    data = {
        "paths": parts,
        "names": [str(part) for part in parts],
        "pattern": str(tmp_path / "*.jsonl"),
        "folder": tmp_path,
        "one name": [str(parts[0])],
    }[form]
    ids = calibration_batches(data, tokenizer, length=16)
    texts = tokenizer.decode(ids.flatten()).split("<end>")
    assert len(set(texts) & set(documents()[:15])) >= 14, "the last of all is cut"
    assert len(set(texts) & set(documents()[15:])) >= (0 if form == "one name" else 14)


def test_several_files_that_do_not_go_together(tokenizer, tmp_path):
    here = write(tmp_path / "a.jsonl", documents())
    with pytest.raises(ValueError, match=r"gone.jsonl' cannot be read: No such file"):
        calibration_batches([here, tmp_path / "gone.jsonl"], tokenizer)
    with pytest.raises(ValueError, match="files of one kind are expected, not of csv, json"):
        calibration_batches([here, write(tmp_path / "a.csv", documents())], tokenizer)
    assert calibration_batches(["see a.jsonl\n" * 9, "a.py"], tokenizer, sequences=1, length=8).shape == (1, 8), "texts"


def test_tables(tokenizer):
    table = pandas.DataFrame({"text": documents(), "number": range(30)}, index=range(100, 130))
    for data in (table, table["text"], {"text": documents()}):
        assert_from(calibration_batches(data, tokenizer, sequences=8, length=32), tokenizer, documents())
    with pytest.raises(ValueError, match="the columns number; name the one"):
        calibration_batches(table[["number"]], tokenizer)


def test_splits(tokenizer, tmp_path):
    half = {"train": documents()[:15], "test": documents()[15:]}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in half.items()})
    splits.save_to_disk(tmp_path / "saved")
    for data in (splits, tmp_path / "saved"):
        for split, part in (("train", half["train"]), ("test", half["test"]), ("train+test", documents())):
            ids = calibration_batches(data, tokenizer, length=16, split=split)
            assert_from(ids, tokenizer, part)
            assert len(set(tokenizer.decode(ids.flatten()).split("<end>")) & set(part)) >= len(part) - 1
        with pytest.raises(ValueError, match="data has splits train, test: choose one"):
            calibration_batches(data, tokenizer, split="validation")


# ---- rows that are tokenized already


def padded(left: bool = False, pad: int = 256):
    """(rows of a tokenizer with padding to 12, what is text of them)."""
    real = [[10 + i] * (3 + i % 8) for i in range(24)]
    rows = {"input_ids": [], "attention_mask": []}
    for ids in real:
        fill, mask = [pad] * (12 - len(ids)), [0] * (12 - len(ids))
        rows["input_ids"].append(fill + ids if left else ids + fill)
        rows["attention_mask"].append(mask + [1] * len(ids) if left else [1] * len(ids) + mask)
    return rows, real


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("form", ["dataset", "torch", "stream", "rows", "columns", "tensors", "splits", "no mask"])
def test_padding_of_tokenized_rows_never_counts(form, left):
    rows, real = padded(left)
    table = datasets.Dataset.from_dict(rows)
    each = [{name: rows[name][i] for name in rows} for i in range(24)]
    data = {
        "dataset": table,
        "torch": table.with_format("torch"),
        "stream": streaming(each),
        "rows": each,
        "columns": rows,
        "tensors": {name: torch.tensor(value) for name, value in rows.items()},
        "splits": datasets.DatasetDict({"train": table}),
        "no mask": table.remove_columns("attention_mask"),
    }[form]
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    flat = calibration_batches(data, tokenizer, length=4).flatten().tolist()
    ends = flat.count(256)
    assert ends <= 24 + 24 * (form == "no mask" and left), "one end a text"
    assert set(flat) - {256} <= {ids[0] for ids in real} and len(flat) - ends >= sum(map(len, real)) - 4


def test_a_mask_of_another_length_is_said(tokenizer):
    with pytest.raises(ValueError, match="calibration document 0: its attention_mask has 2 entries for 3 token ids"):
        calibration_batches([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}], tokenizer, length=2)


# ---- the Hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: a dataset of two configurations; what was asked of it."""
    asked = []

    def load_dataset(path, name=None, split=None, streaming=False, **_):
        asked.append((path, name, split, streaming))
        if path == "two/configurations" and name is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['a', 'b']")
        if path == "a/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        rows = datasets.Dataset.from_dict({"text": [f"{split} {i} " + "x" * 40 for i in range(20)]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_is_streamed(tokenizer, hub):
    calibration_batches("some/data", tokenizer, sequences=4, length=32)
    calibration_batches("two/configurations:b", tokenizer, sequences=4, length=32, split="train+test")
    assert hub == [
        ("some/data", None, "train", True),
        ("two/configurations", "b", "train", True),
        ("two/configurations", "b", "test", True),
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("two/configurations", r"cannot be loaded: Config name is missing.*; write name:configuration"),
        ("a/script", "'a/script' cannot be loaded: Dataset scripts are no longer supported"),
    ],
)
def test_what_the_hub_answers_is_a_sentence(tokenizer, hub, name, says):
    with pytest.raises(ValueError, match=says):
        calibration_batches(name, tokenizer)


def test_a_stream_that_breaks_off_is_a_sentence(tokenizer):
    def generate():
        yield {"text": "a text"}
        raise OSError("the connection was lost")

    data = datasets.IterableDataset.from_generator(generate)
    with pytest.raises(ValueError, match=r"cannot be read on: .*connection was lost"):
        calibration_batches(data, tokenizer, length=8)
