"""The report of a layer: its output error, and what was done differently."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.pruners import PRUNERS
from tests.conftest import tiny, tiny_batch

IDS = tiny_batch("llama", sequences=4, tokens=32)["input_ids"]


def test_a_gap_from_rounding_is_in_the_report():
    model = tiny("llama")
    report = prune(model, make_plan(model, SparsityConfig(0.7), IDS), IDS)
    assert report.target == 0.7 and report.sparsity == pytest.approx(0.6875, abs=0.01)
    assert report.layers["model.layers.0.self_attn.q_proj"].sparsity == int(64 * 0.7) / 64


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_the_reported_error_is_the_output_error(pruner):
    model, dense = tiny("llama"), tiny("llama")
    inputs = []
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1)))
    dense(IDS)
    x = torch.cat(inputs)
    report = prune(model, make_plan(model, SparsityConfig(0.5, pruner=pruner), IDS), IDS)
    before, after = (m.model.layers[0].self_attn.q_proj.weight for m in (dense, model))
    if pruner == "sparsegpt":
        expected = ((x @ (before - after).T) ** 2).sum() / ((x @ before.T) ** 2).sum()
    else:
        squares = (x**2).sum(0)
        expected = ((before - after) ** 2 @ squares).sum() / (before**2 @ squares).sum()
    assert report.layers["model.layers.0.self_attn.q_proj"].error == pytest.approx(float(expected.detach()), rel=1e-4)


def test_sparsegpt_beats_wanda_beats_magnitude_on_the_layer_it_prunes():
    errors = {}
    for pruner in PRUNERS:
        model = tiny("llama")
        x = torch.randn(1, 400, 64) @ torch.randn(64, 64) * torch.rand(64)
        model.model.embed_tokens.weight.data[:100] = x[0, :100]
        report = prune(model, make_plan(model, SparsityConfig(0.6, pruner=pruner), IDS), IDS)
        weight = model.model.layers[0].mlp.up_proj.weight
        dense = tiny("llama")
        dense.model.embed_tokens.weight.data[:100] = x[0, :100]
        inputs = []
        dense.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, a, i=inputs: i.append(a[0].flatten(0, 1)))
        dense(IDS)
        y = inputs[0] @ dense.model.layers[0].mlp.up_proj.weight.T
        errors[pruner] = float(((inputs[0] @ weight.T - y) ** 2).sum())
        assert report.sparsity > 0.58
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
