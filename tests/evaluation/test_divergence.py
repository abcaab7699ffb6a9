"""A masked model against the dense one, on the dense model's stored outputs: as two plain forward passes give it."""

from __future__ import annotations

import copy
import math
from threading import get_ident

import pytest
import torch
import torch.nn.functional as F

from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.evaluation import token_scores
from hf_sparsity.evaluation.divergence import DenseReference, compared
from hf_sparsity.model.layers import find_layers
from tests.conftest import tiny, tiny_batch
from tests.planning.race.searches import texts


def by_hand(dense, sparse, ids):
    """(KL, loss) summed over the predictions of each sequence, from two plain forward passes."""
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, sparse))
    kl = (a.exp() * (a - b)).sum((1, 2))
    loss = F.nll_loss(b.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").reshape(len(ids), -1).sum(1)
    return torch.stack([kl, loss], dim=1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "mixtral", "qwen3_next", "mamba", "deepseek_v3"])
def test_the_judge_sees_what_pruning_does(name):
    model = tiny(name)
    layout = find_layers(model)
    ids = tiny_batch(name, sequences=5)["input_ids"]
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(w.shape, generator=generator) > 0.5 for n, w in layout.weights.items()}
    before = copy.deepcopy(model.state_dict())
    reference = DenseReference(model, layout, prepare_batches(model, ids))
    assert reference.replays
    rows = torch.tensor(reference.rows(lambda block: {n: masks[n] for n in block.weights}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    sparse = copy.deepcopy(model)
    for weight_name, weight in find_layers(sparse).weights.items():
        with torch.no_grad():
            weight.read().mul_(masks[weight_name])
    torch.testing.assert_close(rows[:, :2].double(), by_hand(model, sparse, ids), rtol=1e-4, atol=1e-3)
    assert rows[:, 2].tolist() == [ids.shape[1] - 1] * 5
    dense = torch.tensor(reference.rows())
    assert float(dense[:, 0].abs().max()) < 1e-3


def test_the_judge_of_a_written_model_is_the_same():
    model = tiny("llama")
    layout = find_layers(model)
    batches = prepare_batches(model, texts(4))
    masks = {n: torch.rand(w.shape) > 0.6 for n, w in layout.weights.items()}
    reference = DenseReference(model, layout, batches)
    rows = reference.rows(lambda block: {n: masks[n] for n in block.weights})
    for name, weight in layout.weights.items():
        with torch.no_grad():
            weight.read().mul_(masks[name])
    assert reference.rows() == rows


def test_a_head_that_looks_further_than_the_last_block_has_the_dense_model_run_along():
    model, first = tiny("llama"), {}  # thread -> what the first block gave in it
    model.model.layers[0].register_forward_hook(lambda _, args, output: first.update({get_ident(): output}))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + first.pop(get_ident()),))
    layout, ids = find_layers(model), texts(3)
    masks = {n: torch.rand(w.shape) > 0.6 for n, w in layout.weights.items()}
    reference = DenseReference(model, layout, prepare_batches(model, ids))
    assert not reference.replays
    ran = []
    for block in layout.blocks:
        block.module.mlp.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        assert torch.equal(reference.dense_logits(0), model(ids, use_cache=False).logits)
    assert len(ran) == 2 * len(layout.blocks), "it ran: once for us, once by itself"
    rows = torch.tensor(reference.rows(lambda block: {n: masks[n] for n in block.weights}))
    sparse = copy.deepcopy(model)
    for name, weight in find_layers(sparse).weights.items():
        with torch.no_grad():
            weight.read().mul_(masks[name])
    torch.testing.assert_close(rows[:, :2].double(), by_hand(model, sparse, ids), rtol=1e-4, atol=1e-3)


def test_padding_is_not_judged():
    ids = texts(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    dense, sparse = torch.randn(2, 8, 120), torch.randn(2, 8, 120)
    padded = compared({"input_ids": ids, "attention_mask": mask}, dense, sparse)
    alone = compared({"input_ids": ids[:1, :5]}, dense[:1, :5], sparse[:1, :5])
    assert padded[0] == pytest.approx(alone[0]) and padded[1][2] == 7


def test_long_text_is_compared_in_parts(monkeypatch):
    ids = texts(3, 20)
    dense, sparse = torch.randn(3, 20, 120), torch.randn(3, 20, 120)
    whole = compared({"input_ids": ids}, dense, sparse)
    monkeypatch.setattr(token_scores, "POSITIONS", 120 * 7)
    assert torch.allclose(torch.tensor(compared({"input_ids": ids}, dense, sparse)), torch.tensor(whole))


def test_a_model_that_overflows_counts_as_bad_and_stays_a_number():
    ids = texts(2, 8)
    dense, broken = torch.randn(2, 8, 130), torch.full((2, 8, 130), math.nan)
    assert compared({"input_ids": ids}, dense, broken) == [[7e4, 7e4, 7.0]] * 2
    dense[..., :3] = -math.inf  # a vocabulary with holes
    assert compared({"input_ids": ids}, dense, dense)[0][0] == 0
