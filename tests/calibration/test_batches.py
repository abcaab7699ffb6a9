"""Batches: labels, masks, lengths and what stands beside a model's inputs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.calibration.calibration import model_batches
from hf_sparsity.calibration.positions import check_length, position_limit
from hf_sparsity.calibration.sequences import real_span
from tests.conftest import tiny


def ids(*rows) -> torch.Tensor:
    return torch.tensor(rows)


def tiny_bart(**changes):
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    special = {
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=99, d_model=16, max_position_embeddings=24, **sides, **special, **changes)
    )


# ---- what the decoder reads


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_become_the_decoders_inputs_as_in_training(name):
    model = tiny("t5") if name == "t5" else tiny_bart()
    batch = {"input_ids": ids([5, 6, 7, 8], [9, 10, 11, 12]), "labels": ids([20, 21, 22], [30, -100, -100])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    first, second = prepare_batches(model, [batch])
    start = model.config.decoder_start_token_id
    assert first["input_ids"].tolist() == [[5, 6, 7, 8]] and first["decoder_input_ids"].tolist() == [[start, 20, 21]]
    assert second["decoder_input_ids"].tolist() == [[start, 30]], "the start stands before the first label"
    assert set(first) == set(second) == {"input_ids", "decoder_input_ids"}


def test_a_speech_models_labels_and_their_padding():
    model = tiny("whisper")
    batch = {"input_features": torch.randn(2, 16, 100), "labels": ids([20, 21, 22, 23], [30, 31, -100, -100])}
    first, second = prepare_batches(model, [batch])
    start = model.config.decoder_start_token_id
    assert first["decoder_input_ids"].tolist() == [[start, 20, 21, 22]]
    assert second["decoder_input_ids"].tolist() == [[start, 30, 31]], "padding of the labels is no text"
    assert torch.equal(torch.cat([first["input_features"], second["input_features"]]), batch["input_features"])
    whole = batch | {"labels": ids([20, 21, 22, 23], [30, 31, 32, 33])}
    assert len(prepare_batches(model, [whole])) == 1, "without padding a batch stays one"
    report = prune(model, make_plan(model, SparsityConfig(0.5), [batch]), [batch])
    assert {report.layers[name].tokens for name in report.layers if "decoder.layers.0.self_attn" in name} == {7}


def test_both_sides_are_cut_to_their_text():
    batch = {"input_ids": ids([5, 6, 0, 0], [7, 8, 9, 0]), "attention_mask": ids([1, 1, 0, 0], [1, 1, 1, 0])}
    got = prepare_batches(tiny("t5"), [batch | {"labels": ids([20, 21, -100, -100], [30, 31, 32, 33])}])
    assert [one["input_ids"].shape[1] for one in got] == [2, 3]
    assert [one["decoder_input_ids"].shape[1] for one in got] == [3, 4]
    alone = prepare_batches(tiny("t5"), [batch])  # the decoder reads the encoder's input
    assert [one["decoder_input_ids"].tolist() for one in alone] == [[[5, 6]], [[7, 8, 9]]]


def test_a_dataset_with_labels_feeds_an_encoder_decoder_row_by_row():
    import datasets

    rows = {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[20, 21], [22, 23]],
    }
    data = datasets.Dataset.from_dict(rows | {"text": ["a", "b"]})
    got = prepare_batches(tiny("t5"), model_batches(tiny("t5"), data, {}, None, None, {}))
    assert sorted(one["input_ids"].tolist()[0] for one in got) == [[5, 6, 7], [8, 9]]
    assert {one["decoder_input_ids"].shape[1] for one in got} == {2}


# ---- what stands beside the inputs


def test_what_trainer_takes_out_of_a_batch_is_no_input():
    batch = {
        "input_ids": ids([5, 6, 7]),
        "token_type_ids": ids([0, 0, 0]),
        "special_tokens_mask": ids([1, 0, 1]),
        "text": ["five six seven"],
        "length": torch.tensor([3]),
        "idx": 4,
    }
    (got,) = prepare_batches(tiny("llama"), [batch])
    assert set(got) == {"input_ids"}


def test_a_row_of_a_dataset_is_a_batch_of_one():
    (got,) = prepare_batches(
        tiny("llama"), [{"input_ids": torch.tensor([5, 6, 0]), "attention_mask": torch.tensor([1, 1, 0])}]
    )
    assert got["input_ids"].tolist() == [[5, 6]]


def test_an_input_that_the_model_has_not_is_said():
    model = tiny("llama")
    model.forward = lambda input_ids=None, attention_mask=None: None
    with pytest.raises(ValueError, match="batch 0: the model has no input 'input_id'; its inputs are input_ids"):
        prepare_batches(model, [{"input_id": ids([5, 6]), "input_ids": ids([5, 6])}])


@pytest.mark.parametrize("form", ["generator", "loader", "accelerate"])
def test_batches_come_from_generators_and_loaders(form):
    rows = [{"input_ids": torch.tensor([5 + i, 6, 7])} for i in range(4)]
    data = {
        "generator": lambda: ({"input_ids": row["input_ids"][None]} for row in rows),
        "loader": lambda: torch.utils.data.DataLoader(rows, batch_size=2),
        "accelerate": lambda: (
            __import__("accelerate").Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(rows, batch_size=2))
        ),
    }[form]()
    model = tiny("llama")
    taken = model_batches(model, data, {}, None, None, {})
    for _ in range(2):  # a plan and pruning both take them
        got = prepare_batches(model, taken)
        assert torch.cat([one["input_ids"] for one in got]).tolist() == [[5 + i, 6, 7] for i in range(4)]


# ---- padding without a mask


@pytest.mark.parametrize(
    ("row", "ends", "span"),
    [
        ([5, 6, 0, 0], 2, (0, 2)),
        ([0, 0, 5, 6], 2, (2, 4)),
        ([5, 6, 0], 2, (0, 3)),  # one may be any token
        ([5, 0, 0, 6], 2, (0, 4)),
        ([0, 0, 0], 2, (0, 3)),
        ([5, 6, 0, 0], 0, (0, 3)),  # one of them ends the text
        ([5, 6, 0, 0], [7, 0], (0, 3)),
    ],
)
def test_padding_without_a_mask(row, ends, span):
    assert real_span(row, 0, ends) == span
    assert real_span(row, None, ends) == (0, len(row))


def test_rows_padded_without_a_mask_are_cut():
    got = prepare_batches(tiny("llama"), [{"input_ids": ids([5, 6, 0, 0], [7, 8, 9, 10])}])
    assert [one["input_ids"].tolist() for one in got] == [[[5, 6]], [[7, 8, 9, 10]]]


# ---- lengths


def small(kind, **changes):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return getattr(hf, f"{kind}ForMaskedLM")(
        getattr(hf, f"{kind}Config")(vocab_size=99, max_position_embeddings=34, **shape)
    )


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: tiny("gpt2"), 128),
        (lambda: tiny("opt"), 128),
        (lambda: tiny("llama"), 128),
        (lambda: tiny("whisper"), 64),
        (lambda: small("Bert"), 34),
        (lambda: small("Roberta"), 32),  # its positions begin behind the padding token's
        (tiny_bart, 24),
        (lambda: tiny("mamba"), None),
        (lambda: tiny("bloom"), None),
        (lambda: tiny("t5"), None),
    ],
)
def test_the_positions_that_a_model_has(make, limit):
    model = make()
    assert position_limit(model) == limit
    if limit is None:
        return check_length(model, 10**6)
    names = ("decoder_input_ids", "input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    inputs = {name: torch.full((1, limit), 5) for name in names}
    if model.main_input_name == "input_features":
        inputs = {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": inputs["decoder_input_ids"]}
    with torch.no_grad():
        model.eval()(**inputs)  # the limit itself works
    prepare_batches(model, [inputs])
    inputs[names[0]] = torch.full((1, limit + 1), 5)
    with pytest.raises(ValueError, match=f"of {limit + 1} tokens are longer than the {limit} positions"):
        prepare_batches(model, [inputs])


def test_too_long_is_said_before_any_work():
    model = tiny("gpt2")
    with pytest.raises(
        ValueError,
        match="129 tokens are longer than the 128 positions of GPT2LMHeadModel; give a length of at most 128",
    ):
        make_plan(model, SparsityConfig(0.5, allocator="race"), torch.full((8, 129), 5))
    with pytest.raises(ValueError, match=r"config.max_position_embeddings if the model can do more"):
        model_batches(tiny("llama"), ["text"], {"length": 129}, lambda *_: None, None, {})
    padded = {"input_ids": torch.full((1, 129), 5), "attention_mask": torch.tensor([[0] + [1] * 128])}
    assert len(prepare_batches(model, [padded])) == 1, "what is padding takes no position"
    again = torch.arange(200)[None] % 100
    packed = {"input_ids": torch.full((1, 200), 5), "position_ids": again}
    assert len(prepare_batches(model, [packed])) == 1, "packed texts begin anew"
