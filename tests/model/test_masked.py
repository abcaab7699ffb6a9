"""Masked weights stand in for a block's own while it runs, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity.evaluation.divergence import masked
from hf_sparsity.model.layers import find_layers
from tests.conftest import tiny


def test_masked_weights_stand_in_for_one_call_only():
    model = tiny("mixtral")
    block = find_layers(model).blocks[0]
    before = list(block.module.parameters())
    name = next(n for n in block.weights if n.endswith("[1]"))
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        masked(block, {name: torch.zeros(block.weights[name].shape)}),
    ):
        assert not block.weights[name].read().any() and block.weights[name.replace("[1]", "[0]")].read().all()
        raise RuntimeError("in the middle")
    assert [id(p) for p in block.module.parameters()] == [id(p) for p in before]
