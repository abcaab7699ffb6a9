"""Fisher information: its definition restated, and the candidates' loss of MSP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.algorithm import Pattern
from hf_sparsity.core.stats import NORMS
from hf_sparsity.hf.batches import prepare_batches
from hf_sparsity.hf.evaluate import next_token_loss
from hf_sparsity.hf.fisher import fisher_information
from hf_sparsity.hf.layers import find_layout
from hf_sparsity.hf.probe import MaskedLoss
from hf_sparsity.hf.stream import stream_blocks
from hf_sparsity.pruners import Magnitude, Wanda
from tests.conftest import tiny, tiny_batch

IDS = tiny_batch("llama", sequences=3, tokens=20)["input_ids"]


def restated(model, ids, scale=1.0):
    sums = {}
    for row in ids:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1]
        (scale * F.cross_entropy(logits, row[1:])).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = (
                    sums.get(name, 0) + parameter.grad.double().square().sum(dim=(-2, -1)) if parameter.ndim > 1 else 0
                )
    model.zero_grad()
    return {n: s / len(ids) for n, s in sums.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_is_the_mean_squared_gradient_per_sequence(name):
    model = tiny(name)
    expected = restated(model, IDS)
    layout = find_layout(model)
    found = fisher_information(model, layout, prepare_batches(model, IDS))
    assert set(found) == set(layout.weights)
    for key, value in found.items():
        weight = layout.weights[key]
        want = expected[weight.parameter] if weight.expert is None else expected[weight.parameter][weight.expert]
        assert value == pytest.approx(float(want), rel=1e-3, abs=1e-12)


def test_micro_batching_does_not_change_it_and_a_doubled_loss_is_four_times():
    model = tiny("llama")
    layout = find_layout(model)
    one = fisher_information(model, layout, prepare_batches(model, IDS))
    together = fisher_information(model, layout, prepare_batches(model, [{"input_ids": IDS}]))
    doubled = restated(model, IDS, scale=2.0)
    for name, value in one.items():
        assert together[name] == pytest.approx(value, rel=1e-4)
        assert float(doubled[f"{name}.weight"]) == pytest.approx(4 * value, rel=1e-3)


def test_it_leaves_the_model_as_it_was():
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(64)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    fisher_information(model, find_layout(model), prepare_batches(model, IDS))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(m.training for m in model.modules()) and not model.is_activation_checkpointing
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def true_loss(model, batches):
    total = count = 0
    with torch.no_grad():
        for batch in batches:
            loss, tokens = next_token_loss(batch, model(**batch).logits)
            total, count = total + loss, count + tokens
    return total / count


@pytest.mark.parametrize("pattern", ["unstructured", "*:8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_the_masked_loss_is_the_loss_of_the_model_pruned_with_dense_scores(name, pattern):
    model = tiny(name)
    layout = find_layout(model)
    batches = prepare_batches(model, IDS)
    steps = 16 if pattern == "unstructured" else 8
    pruner = Wanda()
    loss = MaskedLoss(model, layout, batches[:2], batches[2:], pruner, steps, Pattern.parse(pattern))
    assert loss(dict.fromkeys(layout.weights, 0.0)) == pytest.approx(true_loss(model, batches[2:]), rel=1e-5)
    wanted = {n: (i % (steps - 1)) / steps for i, n in enumerate(layout.weights)}
    judged = loss(wanted)
    new = {}
    for block in stream_blocks(model, layout, batches[:2], frozenset({NORMS}), rewrites=False):
        for layer_name, layer in block.layers.items():
            layer.sparsity, layer.pattern = wanted[layer_name], Pattern.parse(pattern).at(wanted[layer_name])
            if layer.stats is None:
                layer.stats = type("S", (), {"norms": torch.ones(layer.weight.shape[1])})()
            new[layer_name] = layer.weight.masked_fill(~pruner.mask(layer, pruner.scores(layer)), 0)
    with torch.no_grad():
        for layer_name, weight in layout.weights.items():
            weight.read().copy_(new[layer_name])
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    assert judged == pytest.approx(true_loss(model, batches[2:]), rel=1e-4)


def test_the_uniform_plan_prunes_as_the_pruner_alone():
    """MSP's genotypes end in one normal run: at the uniform genotype that is the pruner's own 2:8."""
    a, b = tiny("llama"), tiny("llama")
    plan = make_plan(a, SparsityConfig(0.75, pattern="*:8", pruner="magnitude"))
    prune(a, plan)
    prune(b, make_plan(b, SparsityConfig(pattern="2:8", pruner=Magnitude())))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
