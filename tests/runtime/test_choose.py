"""Packed or dense by measurement: what is measured, and what follows from it; not how fast anything is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf

from hf_sparsity import make_plan, pack_model, prune, unpack_model
from hf_sparsity.runtime import choose
from hf_sparsity.runtime.choose import layer_speeds, show_speeds, unpack_slow_layers
from hf_sparsity.runtime.linear import PackedLinear

IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(choose, "FLUSH", 1024)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = hf.LlamaForCausalLM(config).eval()
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    return model


def test_each_kind_is_measured_once(model):
    speeds = layer_speeds(pack_model(model))
    assert {speed.shape: len(speed.names) for speed in speeds} == {(64, 64): 8, (128, 64): 4, (64, 128): 2}
    assert all(min(speed.packed, speed.dense) > 0 and 0.4 < speed.share < 0.5 for speed in speeds)
    assert show_speeds(speeds).count("\n") == 3 and "64 x 128" in show_speeds(speeds)


def test_what_is_slower_packed_becomes_dense(model, monkeypatch):
    dense = copy.deepcopy(model)
    pack_model(model)
    measured = [replace(s, packed=1.0, dense=2.0 if s.shape == (64, 64) else 0.5) for s in layer_speeds(model)]
    monkeypatch.setattr(choose, "layer_speeds", lambda _: measured)
    assert unpack_slow_layers(model) == measured
    packed = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=0)
    unpack_model(model)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


def test_prefer(model):
    with pytest.raises(ValueError, match="prefer='size'"):
        pack_model(model, prefer="size")
    assert pack_model(model, prefer="speed").is_quantized
