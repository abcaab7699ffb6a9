"""The streamer against plain forwards, one architecture of each kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.core.stats import GRAM, NORMS
from hf_sparsity.model.layers import find_layers
from hf_sparsity.streaming.stream import stream_blocks
from tests.conftest import ZOO, tiny, tiny_batch
from tests.streaming.moments import plain_moments


@pytest.mark.parametrize("name", ZOO)
def test_statistics_equal_a_plain_forward(name):
    model = tiny(name)
    batch = tiny_batch(name)
    batches = prepare_batches(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    layout = find_layers(model)
    oracle = plain_moments(model, batches)
    seen = 0
    for block in stream_blocks(model, layout, batches, frozenset({GRAM}), rewrites=False):
        for layer_name, layer in block.layers.items():
            weight = layout.weights[layer_name]
            key = (weight.parameter, weight.expert)
            if layer.stats is None:
                assert key not in oracle.moments, f"{layer_name} was used but not seen"
                continue
            assert layer.weight.shape[1] == layer.stats.gram.shape[0]
            assert layer.stats.tokens == oracle.tokens[key]
            torch.testing.assert_close(layer.stats.gram.double(), oracle.moments[key], rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen >= 0.7 * len(layout.weights)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "mixtral", "gpt_oss", "mamba", "t5"])
def test_the_next_block_sees_what_was_rewritten(name):
    """Inputs while rewriting equal those of a plain forward through the model as it is at the end."""
    model = tiny(name)
    batch = tiny_batch(name)
    batches = prepare_batches(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    layout = find_layers(model)
    first: dict[str, torch.Tensor] = {}
    for block in stream_blocks(model, layout, batches, frozenset({NORMS}), rewrites=True):
        entry = next(iter(block.layers.values()))  # fed by the block's own input, before anything of the block is used
        if entry.stats is not None:
            first[entry.name] = entry.stats.norms.clone()
        for layer in block.layers.values():
            block.write(layer.name, layer.weight * (torch.rand(layer.weight.shape) < 0.5))
    oracle = plain_moments(model, batches)
    for layer_name, norms in first.items():
        weight = layout.weights[layer_name]
        expected = (oracle.moments[weight.parameter, weight.expert].diagonal() / 2).sqrt()
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_masking_equals_writing(name):
    batch = tiny_batch(name)["input_ids"]

    def final(write: bool):
        model = tiny(name)
        layout = find_layers(model)
        outputs = []
        generator = torch.Generator().manual_seed(0)
        stream = stream_blocks(
            model,
            layout,
            prepare_batches(model, batch),
            frozenset(),
            rewrites=True,
            after_last=lambda b, out: outputs.append(out.logits),
        )
        for block in stream:
            for layer in block.layers.values():
                mask = torch.rand(layer.weight.shape, generator=generator) < 0.5
                if write:
                    block.write(layer.name, layer.weight * mask)
                else:
                    block.mask(layer.name, mask)
        return torch.cat(outputs), model

    written, _ = final(True)
    masked, model = final(False)
    torch.testing.assert_close(masked, written)
    for parameter, original in zip(model.parameters(), tiny(name).parameters(), strict=True):
        assert torch.equal(parameter, original)


def test_padding_never_enters_a_statistic():
    model = tiny("llama")
    ids = tiny_batch("llama")["input_ids"]
    layout = find_layers(model)

    def grams(batches):
        return {
            n: x.stats.gram
            for block in stream_blocks(
                model, layout, prepare_batches(model, batches), frozenset({GRAM}), rewrites=False
            )
            for n, x in block.layers.items()
        }

    clean = grams([{"input_ids": ids[:1]}, {"input_ids": ids[1:, :17]}])
    for side in ("left", "right"):
        pad = torch.zeros(1, 7, dtype=torch.int64)
        row = torch.cat([pad, ids[1:, :17]] if side == "left" else [ids[1:, :17], pad], dim=1)
        mask = torch.stack([torch.ones(24, dtype=torch.int64), (row[0] != 0).long()])
        padded = grams([{"input_ids": torch.cat([ids[:1], row]), "attention_mask": mask}])
        for key, value in clean.items():
            torch.testing.assert_close(padded[key], value)


def test_padding_of_encoder_and_decoder():
    model = tiny("t5")
    batch = tiny_batch("t5")
    layout = find_layers(model)
    short = {"input_ids": batch["input_ids"][:1, :17], "decoder_input_ids": batch["decoder_input_ids"][:1]}
    padded = {
        "input_ids": F.pad(short["input_ids"], (0, 7)),
        "attention_mask": F.pad(torch.ones(1, 17, dtype=torch.int64), (0, 7)),
        "decoder_input_ids": short["decoder_input_ids"],
    }

    def tokens(batch):
        stream = stream_blocks(model, layout, prepare_batches(model, [batch]), frozenset({NORMS}), rewrites=False)
        return {n: (x.stats.tokens, x.stats.norms) for b in stream for n, x in b.layers.items()}

    for (name, (count, norms)), (padded_count, padded_norms) in zip(
        tokens(short).items(), tokens(padded).values(), strict=True
    ):
        assert count == padded_count, name
        torch.testing.assert_close(norms, padded_norms, rtol=1e-4, atol=1e-5)


def test_layers_fed_by_one_tensor_share_statistics():
    model = tiny("llama")
    layout = find_layers(model)
    batches = prepare_batches(model, tiny_batch("llama")["input_ids"])
    block = next(stream_blocks(model, layout, batches, frozenset({GRAM}), rewrites=False))
    stats = {name.rsplit(".", 1)[-1]: layer.stats for name, layer in block.layers.items()}
    assert stats["q_proj"] is stats["k_proj"] is stats["v_proj"]
    assert stats["gate_proj"] is stats["up_proj"]
    assert len({id(s) for s in stats.values()}) == 4


def test_a_block_that_runs_twice_gathers_over_both_and_is_yielded_once():
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    layout = find_layers(model)
    assert [b.name for b in layout.blocks if b.weights] == ["model.layers.0", "model.layers.2"]
    batches = prepare_batches(model, tiny_batch("llama")["input_ids"])
    oracle = plain_moments(model, batches)
    names = []
    for block in stream_blocks(model, layout, batches, frozenset({GRAM}), rewrites=True):
        names.append(block.name)
        for name, layer in block.layers.items():
            weight = layout.weights[name]
            torch.testing.assert_close(
                layer.stats.gram.double(), oracle.moments[weight.parameter, None], rtol=1e-5, atol=1e-5
            )
    assert names == ["model.layers.0", "model.layers.2"]


def test_an_error_in_the_model_surfaces_and_everything_is_restored():
    model = tiny("llama")
    before = [block.forward for block in model.model.layers]
    layout = find_layers(model)
    batches = prepare_batches(model, tiny_batch("llama")["input_ids"])
    stream = stream_blocks(model, layout, batches, frozenset({NORMS}), rewrites=True)
    next(stream)
    model.model.layers[1].mlp.act_fn = None
    with pytest.raises(TypeError):
        list(stream)
    assert [block.forward for block in model.model.layers] == before
    abandoned = stream_blocks(tiny("llama"), find_layers(model), batches, frozenset({NORMS}), rewrites=True)
    abandoned.close()
