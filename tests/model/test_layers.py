"""Which weights are pruned: not those that are ignored, routers, tied or quantized."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_sparsity import SparsityConfig, make_plan, prune
from tests.conftest import tiny, tiny_batch

IDS = tiny_batch("llama", sequences=4, tokens=32)["input_ids"]


def test_ignored_layers_stay_dense_and_do_not_count():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    config = SparsityConfig(0.5, ignore=("model.layers.0", "down_proj", "*.2.self_attn.*", "lm_head"))
    plan = make_plan(model, config, IDS)
    report = prune(model, plan, IDS)
    assert len(plan.layers) == 21 - 7 - 2 - 4
    for key, value in model.state_dict().items():
        if key.startswith("model.layers.0.") or "down_proj" in key or ".2.self_attn." in key:
            assert torch.equal(value, before[key])
    assert report.skipped["model.layers.0.mlp.up_proj"].startswith("ignored")
    assert "outside the blocks" in report.skipped["lm_head.weight"]
    with pytest.raises(ValueError, match="matches no layer"):
        make_plan(model, SparsityConfig(0.5, ignore=("qq_proj",)), IDS)


def test_routers_and_other_parameters_are_named_not_skipped_in_silence():
    model = tiny("gpt_oss")
    report = prune(model, make_plan(model, SparsityConfig(0.5), [tiny_batch("gpt_oss")]), [tiny_batch("gpt_oss")])
    reasons = {n.split(".", 3)[-1]: r for n, r in report.skipped.items()}
    assert reasons["mlp.router.weight"] == "router" and reasons["mlp.experts.down_proj_bias"] == "bias"
    mamba = tiny("mamba")
    skipped = prune(mamba, make_plan(mamba, SparsityConfig(0.5), IDS), IDS).skipped
    assert skipped["backbone.layers.0.mixer.conv1d.weight"] == "convolution"
    assert "not a linear layer" in skipped["backbone.layers.0.mixer.A_log"]


def test_quantized_models_are_refused():
    model = tiny("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        make_plan(model, SparsityConfig(0.5), IDS)


def test_tied_weights_inside_blocks_stay_dense():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    report = prune(model, make_plan(model, SparsityConfig(0.5), IDS), IDS)
    assert report.skipped["model.layers.1.mlp.up_proj.weight"].startswith(
        "is the same parameter as model.layers.0.mlp.up_proj"
    )
