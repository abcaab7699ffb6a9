"""Calibration data in every form users have it, and the batches that the stream walks with."""

from __future__ import annotations

import json
import logging
import random
import string

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from hf_sparsity.calibration.batches import data_fingerprint, prepare_batches
from hf_sparsity.calibration.calibration import calibration_batches, default_length, read_texts
from hf_sparsity.demo import PATH
from tests.calibration.texts import END, assert_from, documents, make_tokenizer, streaming, texts_in
from tests.conftest import tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def chats(count: int = 20) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number, {i}."}]
        for i in range(count)
    ]


# ---- every form of data


def test_a_list_of_texts(tokenizer):
    ids = calibration_batches(documents(), tokenizer, sequences=8, length=32)
    assert ids.dtype == torch.int64 and ids.shape == (8, 32)
    assert_from(ids, tokenizer, documents())


def test_the_tokenizer_of_the_demo_model():
    ids = calibration_batches(
        ["import os\n" * 50, "def f():\n    return 1\n" * 40], AutoTokenizer.from_pretrained(PATH), length=16
    )
    assert ids.shape[1] == 16 and int(ids.min()) >= 0 and int(ids.max()) < len(AutoTokenizer.from_pretrained(PATH))


@pytest.mark.parametrize("form", ["list", "dataset", "streaming", "sharegpt", "one column of two"])
def test_chats_go_through_the_chat_template(form):
    tokenizer = make_tokenizer(TEMPLATE)
    data = {
        "list": lambda: chats(),
        "dataset": lambda: datasets.Dataset.from_dict({"messages": chats()}),
        "streaming": lambda: streaming([{"messages": chat} for chat in chats()]),
        "sharegpt": lambda: [
            {"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]} for chat in chats()
        ],
        "one column of two": lambda: datasets.Dataset.from_dict({"text": ["no"] * 20, "messages": chats()}),
    }[form]()
    ids = calibration_batches(data, tokenizer, sequences=8, length=32)
    assert_from(ids, tokenizer, [f"[user]What is {i}?[assistant]A number, {i}." for i in range(20)])


@pytest.mark.parametrize("column", ["text", "content", "body"])
@pytest.mark.parametrize("stream", [False, True])
def test_datasets(tokenizer, column, stream):
    rows = [{"id": i, column: text} for i, text in enumerate(documents())]
    data = streaming(rows) if stream else datasets.Dataset.from_list(rows)
    named = {} if column != "body" else {"column": "body"}
    ids = calibration_batches(data, tokenizer, sequences=8, length=32, **named)
    assert_from(ids, tokenizer, documents())


def test_a_dataset_turned_into_a_stream(tokenizer):
    data = datasets.Dataset.from_dict({"text": documents()}).to_iterable_dataset()
    assert_from(calibration_batches(data, tokenizer, sequences=8, length=32), tokenizer, documents())


def test_a_dataset_of_token_ids_needs_no_tokenizer():
    rows = [[i] * 10 for i in range(1, 9)]
    for data in (
        datasets.Dataset.from_dict({"input_ids": rows}),
        datasets.Dataset.from_dict({"input_ids": rows}).with_format("numpy"),
    ):
        ids = calibration_batches(data, length=10)
        assert sorted(ids.tolist()) == rows


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("as_path", [False, True])
def test_local_files(tokenizer, tmp_path, suffix, as_path):
    path = tmp_path / f"data{suffix}"
    rows = datasets.Dataset.from_dict({"text": documents()})
    if suffix == ".txt":
        path.write_text("\n".join(documents()), encoding="utf-8")
    elif suffix in (".jsonl", ".json"):
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents()))
    else:
        (rows.to_parquet if suffix == ".parquet" else rows.to_csv)(str(path))
    ids = calibration_batches(path if as_path else str(path), tokenizer, sequences=8, length=32)
    if suffix == ".txt":  # one document, in its own order
        assert "\n".join(documents()).startswith(tokenizer.decode(ids.flatten().tolist()).rstrip("\ufffd"))
    else:
        assert_from(ids, tokenizer, documents())
        assert read_texts(str(path)) == documents()


def test_a_saved_dataset(tokenizer, tmp_path):
    datasets.Dataset.from_dict({"text": documents()}).save_to_disk(tmp_path / "saved")
    ids = calibration_batches(tmp_path / "saved", tokenizer, sequences=8, length=32)
    assert_from(ids, tokenizer, documents())


def test_token_ids_as_they_are():
    ids = torch.arange(60, dtype=torch.int32).reshape(5, 12)
    assert torch.equal(calibration_batches(ids), ids.long())
    assert calibration_batches(ids).dtype == torch.int64
    assert torch.equal(calibration_batches(ids, sequences=2, length=4), ids[:2, :4].long())
    assert sorted(calibration_batches(ids.tolist(), length=12).tolist()) == ids.tolist()
    assert sorted(calibration_batches(list(ids), length=12).tolist()) == ids.tolist()
    assert sorted(calibration_batches(ids.numpy(), length=12).tolist()) == ids.tolist()


def test_a_generator_of_texts(tokenizer):
    ids = calibration_batches((text for text in documents()), tokenizer, sequences=4, length=32)
    assert texts_in(ids, tokenizer)[:2] == documents()[:2]


def test_rows_without_text_are_passed_over(tokenizer):
    rows = [{"text": text} for text in [None, "", *documents(), None]]
    ids = calibration_batches(datasets.Dataset.from_list(rows), tokenizer, sequences=8, length=32)
    assert "" not in texts_in(ids, tokenizer)[:-1]
    assert_from(ids, tokenizer, documents())


# ---- packing


def test_full_packing_has_no_padding_and_ends_every_document(tokenizer):
    texts = documents(12)
    stream = sum(len(text.encode()) + 1 for text in texts)
    ids = calibration_batches(texts, tokenizer, length=10)
    assert ids.shape == (stream // 10, 10)
    flat = ids.flatten().tolist()
    lengths = {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts}
    packed: list[int] = []
    for token in flat:
        packed.append(token)
        if token == END:
            assert tuple(packed[:-1]) in lengths
            lengths.remove(tuple(packed[:-1]))
            packed = []
    assert len(lengths) <= 1, "only the last document may be cut"


def test_full_packing_does_not_end_a_document_twice():
    ids = calibration_batches([[1, 2, END]] * 4, make_tokenizer(), length=3)
    assert ids.tolist() == [[1, 2, END]] * 4


def test_full_packing_without_an_end_token():
    assert calibration_batches([[1, 2, 3]] * 4, length=6).tolist() == [[1, 2, 3, 1, 2, 3]] * 2


def test_the_papers_packing(tokenizer):
    """Each row is a window of one document that is longer than it; shorter ones are left out, as locuslab/wanda does."""
    texts = [f"{i}: " + string.ascii_letters * (1 if i % 2 else 4) for i in range(40)]
    ids = calibration_batches(texts, tokenizer, sequences=16, length=60, packing="documents")
    assert ids.shape == (16, 60) and END not in ids
    starts = set()
    for row in ids.tolist():
        found = tokenizer.decode(row)
        homes = [text for i, text in enumerate(texts) if found in text]
        assert homes and all(len(text) > 60 for text in homes)
        starts.add(homes[0].index(found))
    assert len(starts) > 5, "the windows do not start at random"


def test_the_papers_packing_wants_documents_longer_than_a_sequence(tokenizer):
    with pytest.raises(ValueError, match="empty or too short"):
        calibration_batches(["a" * 20] * 9, tokenizer, sequences=1, length=20, packing="documents")
    assert calibration_batches(["a" * 21] * 9, tokenizer, sequences=1, length=20, packing="documents").shape == (1, 20)


# ---- the same every time


@pytest.mark.parametrize("packing", ["full", "documents"])
@pytest.mark.parametrize("form", ["list", "dataset", "streaming"])
def test_the_same_seed_gives_the_same_ids(tokenizer, form, packing):
    def draw(seed, state=0):
        random.seed(state)  # no global state takes part
        torch.manual_seed(state)
        data = {
            "list": documents,
            "dataset": lambda: datasets.Dataset.from_dict({"text": documents()}),
            "streaming": lambda: streaming([{"text": text} for text in documents()]),
        }[form]()
        return calibration_batches(data, tokenizer, sequences=6, length=16, seed=seed, packing=packing)

    assert torch.equal(draw(0), draw(0, state=1))
    assert not torch.equal(draw(0), draw(1))


def test_the_callers_list_is_not_reordered(tokenizer):
    texts = documents()
    calibration_batches(texts, tokenizer, sequences=2, length=16)
    assert texts == documents()


# ---- how many, how long


def test_default_length_is_the_tokenizers_limit_or_2048():
    text = ["x" * 70_000]
    assert calibration_batches(text, make_tokenizer(limit=48), sequences=1).shape == (1, 48)
    assert calibration_batches(text, make_tokenizer(limit=10**30), sequences=1).shape == (1, 2048)
    assert calibration_batches(text, make_tokenizer(limit=48), sequences=1, length=100).shape == (1, 100)
    assert calibration_batches([[5] * 5000]).shape == (2, 2048)
    assert default_length(tiny("llama"), make_tokenizer(limit=10**30)) == 128  # max_position_embeddings
    assert default_length(tiny("llama"), make_tokenizer(limit=48)) == 48
    assert default_length(tiny("mamba"), make_tokenizer(limit=10**30)) == 2048


def test_by_default_128_sequences_or_what_there_is(tokenizer, caplog):
    assert calibration_batches(["x" * 10_000], tokenizer, length=10).shape == (128, 10)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert calibration_batches(["x" * 99], tokenizer, length=10).shape == (10, 10)
    assert "10 of 128 sequences" in caplog.text


def test_too_little_for_what_was_asked(tokenizer):
    with pytest.raises(ValueError, match=r"fill 10 of 11 sequences of 10 tokens; .* sequences=10"):
        calibration_batches(["x" * 99], tokenizer, sequences=11, length=10)
    with pytest.raises(ValueError, match="do not fill one sequence of 101 tokens"):
        calibration_batches(["x" * 99], tokenizer, length=101)
    with pytest.raises(ValueError, match=r"\[5, 12\] are too few for sequences=6"):
        calibration_batches(torch.ones(5, 12, dtype=torch.int64), sequences=6)
    with pytest.raises(ValueError, match=r"length=13"):
        calibration_batches(torch.ones(5, 12, dtype=torch.int64), length=13)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sequences": 0}, "sequences=0"),
        ({"sequences": -1}, "sequences=-1"),
        ({"sequences": True}, "sequences=True"),
        ({"sequences": 1.5}, "sequences=1.5"),
        ({"length": 1}, "length=1"),
        ({"length": 0}, "length=0"),
        ({"length": "8"}, "length='8'"),
        ({"packing": "padded"}, "packing='padded': use 'full' or 'documents'"),
    ],
)
def test_bad_options(tokenizer, arguments, says):
    with pytest.raises(ValueError, match=says):
        calibration_batches(documents(), tokenizer, **arguments)
    with pytest.raises(ValueError, match=says):
        calibration_batches(torch.ones(4, 8, dtype=torch.int64), **arguments)


# ---- mistakes


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "empty"),
        (["", ""], "empty or too short"),
        (None, "of type NoneType are not understood"),
        (7, "of type int are not understood"),
        ({"train": ["a"]}, r"splits train: choose one, data\['train'\]"),
        ([["a", "b"]], "a text, a chat or token ids are expected"),
        ([1, 2, 3], "calibration document 1: it is a int"),
        ([[0.5, 1.5]], "list of float; token ids are integers"),
        ([{"title": "a"}], "fields title; name the one to use"),
        (torch.ones(4, 8), r"must be integers \[sequences, tokens\], not torch.float32 \[4, 8\]"),
        (torch.ones(8, dtype=torch.int64), r"not torch.int64 \[8\]"),
        (torch.ones(0, 8, dtype=torch.int64), r"not torch.int64 \[0, 8\]"),
        (torch.ones(4, 8, dtype=torch.bool), "not torch.bool"),
    ],
)
def test_data_that_are_none(tokenizer, data, says):
    with pytest.raises(ValueError, match=says):
        calibration_batches(data, tokenizer, length=4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_column_names_the_columns(tokenizer, stream):
    rows = [{"title": "a", "body": "b"}]
    data = streaming(rows) if stream else datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match="no column 'text'; it has title, body"):
        calibration_batches(data, tokenizer, column="text")
    with pytest.raises(ValueError, match=r"has the columns title, body; .* column=\.\.\."):
        calibration_batches(data, tokenizer)


def test_empty_datasets(tokenizer):
    for data in (datasets.Dataset.from_dict({"text": []}), streaming([])):
        with pytest.raises(ValueError, match="empty"):
            calibration_batches(data, tokenizer)


def test_no_tokenizer():
    for data in (documents(), chats(), datasets.Dataset.from_dict({"text": documents()})):
        with pytest.raises(ValueError, match="need a tokenizer: pass tokenizer="):
            calibration_batches(data)


def test_no_chat_template(tokenizer):
    with pytest.raises(ValueError, match="no chat_template"):
        calibration_batches(chats(), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "No such file"),
        ("missing.jsonl", None, "No such file"),
        ("empty.txt", b"", "it is empty"),
        ("empty.jsonl", b"", "it is empty"),
        ("model.bin", b"x", "one of .txt"),
        ("latin.txt", b"\xe9\xff", "utf-8"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": ', "JSON parse error"),
        ("cut.parquet", b"PAR1xxxx", "Parquet magic bytes"),
        ("columns.jsonl", b'{"title": "a"}\n', "the columns title"),
    ],
)
def test_files_that_cannot_be_read(tokenizer, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        calibration_batches(tmp_path / name, tokenizer)
    assert name in str(error.value) or "columns" in name


def test_a_folder_that_holds_no_dataset(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read: Directory .* is neither"):
        calibration_batches(tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["c4", "wikitext2", "some-one/some-data", "nowhere"])
def test_a_hub_dataset_without_a_network(tokenizer, name):
    with pytest.raises(ValueError, match=f"'{name}' are neither a local file nor a dataset that could be reached"):
        calibration_batches(name, tokenizer)


def test_perplexity_is_not_measured_on_chats(tmp_path):
    for column in ("messages", "conversations"):
        (tmp_path / "chats.jsonl").write_text(json.dumps({column: chats(1)[0]}))
        with pytest.raises(ValueError, match="holds chats"):
            read_texts(str(tmp_path / "chats.jsonl"))


# ---- prepare_batches


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")  # vocabulary of 128


def ids(*rows) -> torch.Tensor:
    return torch.tensor(rows)


def test_a_tensor_runs_one_sequence_at_a_time(llama):
    batches = prepare_batches(llama, torch.arange(12).reshape(3, 4))
    assert [b["input_ids"].tolist() for b in batches] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert all(set(b) == {"input_ids"} for b in batches)


def test_dicts_tensors_and_lists_are_taken_as_batches(llama):
    given = [{"input_ids": ids([1, 2], [3, 4]), "labels": ids([1, 2], [3, 4])}, ids([5, 6]), torch.tensor([7, 8])]
    given.append({"input_ids": [[9, 10]], "attention_mask": None})
    got = prepare_batches(llama, iter(given))
    assert [b["input_ids"].tolist() for b in got] == [[[1, 2], [3, 4]], [[5, 6]], [[7, 8]], [[9, 10]]]
    assert all(set(b) == {"input_ids"} for b in got)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (ids([1, 128]), r"ids from 1 to 128, but the model's vocabulary is \[0, 128\)"),
        (ids([-100, 5]), "ids from -100 to 5"),
        (torch.rand(2, 4), "must be integers"),
        (torch.ones(2, 4, dtype=torch.bool), "must be integers"),
        (torch.arange(4), r"shape \[sequences, tokens\], not \[4\]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), r"not \[1, 2, 3\]"),
        (ids([1], [2]), "at least 2 tokens"),
        (torch.ones(0, 4, dtype=torch.int64), "empty"),
        ([], "empty"),
        (iter(()), "empty"),
        ({"input_ids": ids([1, 2])}, "not dict"),
        ("some text", "not str; texts go through calibration_batches"),
        ([[1, 2, 3]], "batch 0 is a list; a dict"),
        (["text"], "batch 0 is a str"),
        ([{}], "has no inputs"),
        ([{"labels": ids([1, 2])}], "has no inputs"),
        ([{"input_ids": ids([1, 2])}, {"input_ids": "text"}], "batch 1: input_ids"),
        ([{"input_ids": [[1, 2], [3]]}], "batch 0: input_ids"),
        ([{"input_ids": ids([1, 2])}, {"input_ids": ids([1, 2, 300])}], "batch 1: input_ids has ids from 1 to 300"),
        ([{"input_ids": ids([1, 2]), "pixel_values": torch.tensor([[float("nan")]])}], "pixel_values has NaN"),
        ([{"input_ids": ids([1, 2, 3]), "attention_mask": ids([1, 0])}], r"attention_mask \[1, 2\] does not fit"),
        ([{"attention_mask": ids([1, 0])}], "batch 0"),
        ([{"input_ids": ids([1, 2]), "attention_mask": ids([0, 0])}], "empty"),
    ],
)
def test_batches_that_cannot_be_run(llama, batches, says):
    with pytest.raises(ValueError, match=says):
        prepare_batches(llama, batches)


def test_padded_rows_are_cut_to_their_tokens(llama):
    batch = {
        "input_ids": ids([0, 0, 5, 6], [7, 8, 9, 0], [1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 5]),
        "attention_mask": ids([0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]),
    }
    got = prepare_batches(llama, [batch])
    assert [b["input_ids"].tolist() for b in got] == [[[5, 6]], [[7, 8, 9]], [[1, 2, 3, 4]]]
    assert all(set(b) == {"input_ids"} for b in got)


def test_holes_are_left_to_the_models_own_mask(llama):
    batch = {"input_ids": ids([5, 0, 6, 7], [1, 2, 0, 0]), "attention_mask": ids([1, 0, 1, 1], [1, 1, 0, 0])}
    got = prepare_batches(llama, [batch])
    assert len(got) == 1
    assert torch.equal(got[0]["input_ids"], batch["input_ids"])
    assert torch.equal(got[0]["attention_mask"], batch["attention_mask"])


def test_padding_beside_other_inputs_is_left_alone(llama):
    batch = {"input_ids": ids([5, 6, 0]), "attention_mask": ids([1, 1, 0]), "position_ids": ids([0, 1, 2])}
    (got,) = prepare_batches(llama, [batch])
    assert set(got) == set(batch)


def test_an_encoder_decoder_reads_back_its_own_input():
    (got,) = prepare_batches(tiny("t5"), ids([5, 6, 7]))
    assert torch.equal(got["decoder_input_ids"], got["input_ids"])


def test_fingerprint_tells_data_apart(llama):
    a, b = torch.arange(8).reshape(2, 4), torch.arange(1, 9).reshape(2, 4)
    first = data_fingerprint(prepare_batches(llama, a))
    assert first == data_fingerprint(prepare_batches(llama, a.int().clone()))
    assert (first["sequences"], first["tokens"], len(first["sha256"])) == (2, 8, 64)
    assert first["sha256"] != data_fingerprint(prepare_batches(llama, b))["sha256"]
    assert first["sha256"] != data_fingerprint(prepare_batches(llama, a.reshape(1, 8)))["sha256"]
    padded = [
        {
            "input_ids": torch.cat([torch.zeros(2, 1, dtype=torch.int64), a], 1),
            "attention_mask": ids([0, 1, 1, 1, 1], [0, 1, 1, 1, 1]),
        }
    ]
    assert first == data_fingerprint(prepare_batches(llama, padded))
