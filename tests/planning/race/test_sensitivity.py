"""Slopes against a whole model's gradient and against differences, offloaded, in parts and on two processes."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_sparsity.algorithm import Pattern
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.core.budget_grid import Grid
from hf_sparsity.core.nested_masks import Ranks
from hf_sparsity.distributed import Processes
from hf_sparsity.evaluation.divergence import DenseReference, by_token
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.race.evaluator import Evaluator, SearchBudget
from hf_sparsity.planning.race.sensitivity import layer_sensitivities, window
from hf_sparsity.planning.race.survey import survey
from hf_sparsity.pruners import Wanda
from tests.conftest import tiny, tiny_batch
from tests.planning.race.searches import texts
from tests.planning.surroundings import offloaded, surroundings
from tests.tools import several


def prepared(name, model=None, sequences=4):
    model = model or tiny(name)
    layout = find_layers(model)
    data = prepare_batches(model, [tiny_batch(name, sequences=sequences)])
    _, ranks = survey(tiny(name), find_layers(tiny(name)), data, allocators=(), pruner=Wanda(), pattern=Pattern())
    steps = {n: len(r.zeros) * (4 + i % 3) // 8 for i, (n, r) in enumerate(ranks.items())}
    steps |= dict(zip(steps, (0, 1), strict=False))  # of one layer nothing was taken, of another hardly anything
    return model, layout, ranks, steps, DenseReference(model, layout, data)


def slopes(name, model=None, metric="kl"):
    *_, ranks, steps, reference = prepared(name, model)
    return layer_sensitivities(reference, 0, ranks, steps, metric)


@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "mamba", "qwen3_next"])
def test_they_are_the_gradient_of_the_masked_model(name, metric):
    model, layout, ranks, steps, reference = prepared(name)
    batch, dense = reference.batches[0], reference.dense_logits(0)
    *found, count = layer_sensitivities(reference, 0, ranks, steps, metric)
    sparse = copy.deepcopy(model)
    weights = find_layers(sparse).weights
    for n, weight in weights.items():
        weight.read().mul_(ranks[n].mask(steps[n]))
    if hasattr(sparse, "set_experts_implementation"):
        sparse.set_experts_implementation("eager")
    kl, loss, real = by_token(batch, dense, sparse.eval()(**batch, use_cache=False).logits)
    (kl if metric == "kl" else loss).sum().backward()
    assert count == real.sum() == real.numel()
    for (n, weight), value in zip(weights.items(), found, strict=True):
        gradient = weight.part(weight.stored.grad)
        first, last = window(ranks[n], steps[n])
        near = (ranks[n].survives >= first) & (ranks[n].survives < last)
        expected = -float((gradient * layout.weights[n].read())[near].double().sum())
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(set(found)) > len(found) / 2


@pytest.mark.parametrize("where", ["cpu", "disk", "mixed"])
def test_offloaded_they_are_the_same_to_the_last_bit(where, tmp_path):
    expected = slopes("mixtral")
    model = offloaded(tiny("mixtral"), where, tmp_path)
    before = surroundings(model)
    assert slopes("mixtral", model) == expected
    assert surroundings(model) == before


def test_padding_has_no_slope():
    model, layout, ranks, steps, _ = prepared("llama")
    ids = texts(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0

    def sums(batch):
        return layer_sensitivities(DenseReference(model, layout, [batch]), 0, ranks, steps, "kl")

    group_experts = sums({"input_ids": ids, "attention_mask": mask})
    alone = zip(sums({"input_ids": ids[:1, :7]}), sums({"input_ids": ids[1:]}), strict=True)
    assert group_experts[-1] == 6 + 11 and group_experts == pytest.approx(
        [sum(pair) for pair in alone], rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("name", ["llama", "mixtral", "whisper", "t5"])
def test_a_batch_in_parts_has_the_same_slopes(name, monkeypatch):
    """One sequence keeps 3 blocks x 24 tokens x 64 float32, 18 KiB; 48 KiB hold two of four."""
    whole, counts = slopes(name), []
    monkeypatch.setattr("hf_sparsity.planning.race.sensitivity.SHARE", 10**9)
    for limit in (48 * 2**10, 1):
        monkeypatch.setattr("hf_sparsity.planning.race.sensitivity.INPUTS", limit)
        model = tiny(name)
        counts.append([])
        model.register_forward_hook(
            lambda _, args, output: counts[-1].append(len(output.logits)) if output.logits.requires_grad else None
        )
        assert slopes(name, model) == pytest.approx(whole, rel=1e-3, abs=1e-6)
        assert len(set(counts[-1])) == 1 and sum(counts[-1]) == 4
    if name == "llama":
        assert counts == [[2, 2], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("steps", "step", "expected"), [(256, 100, (84, 116)), (256, 3, (0, 19)), (8, 4, (3, 5)), (8, 7, (6, 7))]
)
def test_a_slope_is_taken_over_a_few_steps(steps, step, expected):
    ranks = Ranks(torch.zeros(1, 1, dtype=torch.uint8), tuple(range(steps)), 1)
    assert window(ranks, step) == expected


def test_the_model_is_as_it_was():
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before, weights = surroundings(model), copy.deepcopy(model.state_dict())
    slopes("llama", model)
    assert surroundings(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def evaluator(tokens: int = 24, count: int = 4, processes: Processes | None = None, journal=None) -> Evaluator:
    model = tiny("llama")
    layout, data = find_layers(model), prepare_batches(model, texts(count, tokens))
    _, ranks = survey(model, layout, data, allocators=(), pruner=Wanda(), pattern=Pattern())
    sizes = {n: r.size for n, r in ranks.items()}
    made = Grid({n: r.zeros for n, r in ranks.items()}, sizes, {n: r.cells for n, r in ranks.items()}, 0.6)
    pieces = [DenseReference(model, layout, part) for part in (data[: count // 2], data[count // 2 :])]
    return Evaluator(pieces, made, ranks, SearchBudget({}, processes or Processes(), journal))


def test_they_foretell_what_a_few_weights_more_or_less_do():
    one = evaluator(count=8)
    point = one.grid.nearest(dict.fromkeys(one.grid.names, 0.6))
    found = one.slopes(point, [0, 1], "kl")
    foretold, measured = [], []
    for i, name in enumerate(one.grid.names):
        zeros, more, less = one.grid.zeros[name], list(point), list(point)
        more[i], less[i] = point[i] + 2, point[i] - 2
        high, low = (s.mean() for s in one.scores_on([tuple(more), tuple(less)], [0, 1]))
        foretold.append(found[name] * (zeros[more[i]] - zeros[less[i]]))
        measured.append(high - low)
    assert torch.corrcoef(torch.tensor([foretold, measured]))[0, 1] > 0.7
    assert sum(map(abs, foretold)) == pytest.approx(sum(map(abs, measured)), rel=0.5)


def test_pieces_add_up_and_cost_four_passes():
    one = evaluator()
    point = one.grid.nearest(dict.fromkeys(one.grid.names, 0.6))
    first, second, both = (one.slopes(point, pieces, "kl") for pieces in ([0], [1], [0, 1]))
    assert {n: pytest.approx((first[n] + second[n]) / 2, rel=1e-9) for n in both} == both and first != second
    assert one.budget.spent == {"evals": 0, "tokens": 4 * 24 * (2 + 2 + 4)}


def shared(processes: Processes) -> dict[str, float]:
    one = evaluator(processes=processes)
    return one.slopes(one.grid.nearest(dict.fromkeys(one.grid.names, 0.6)), [0, 1], "kl")


def test_two_processes_have_the_same_slopes():
    with several(2) as call:
        assert call(shared) == [shared(Processes())] * 2
