"""Zeros are counted."""

from __future__ import annotations

from hf_sparsity import SparsityConfig, make_plan, measure_sparsity, prune
from tests.conftest import tiny, tiny_batch


def test_measure_sparsity_counts():
    model = tiny("llama")
    assert measure_sparsity(model).sparsity == 0
    prune(model, make_plan(model, SparsityConfig(0.5)), tiny_batch("llama")["input_ids"])
    measured = measure_sparsity(model)
    assert measured.sparsity == 0.5 == measured.target
    assert measured.layers["model.layers.0.mlp.up_proj"].planned == 0.5
