"""Fisher information: its definition restated, and the candidates' loss of MSP."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.algorithm import Pattern
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.core.stats import NORMS
from hf_sparsity.evaluation.perplexity import next_token_loss
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.fisher import fisher_information
from hf_sparsity.planning.masked_loss import MaskedLoss
from hf_sparsity.pruners import Magnitude, Wanda
from hf_sparsity.streaming.stream import stream_blocks
from tests.conftest import gemma3n, tiny, tiny_batch
from tests.planning.surroundings import offloaded, surroundings
from tests.tools import row_and_column

IDS = tiny_batch("llama", sequences=3, tokens=20)["input_ids"]


def restated(model, ids, scale=1.0):
    sums = {}
    for row in ids:
        model.zero_grad()
        logits = model(row[None], use_cache=False).logits[0, :-1]
        (scale * F.cross_entropy(logits, row[1:])).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = (
                    sums.get(name, 0) + parameter.grad.double().square().sum(dim=(-2, -1)) if parameter.ndim > 1 else 0
                )
    model.zero_grad()
    return {n: s / len(ids) for n, s in sums.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt"])
def test_it_is_the_mean_squared_gradient_per_sequence(name):
    model = tiny(name)
    expected = restated(model, IDS)
    layout = find_layers(model)
    found = fisher_information(model, layout, prepare_batches(model, IDS))
    assert set(found) == set(layout.weights)
    for key, value in found.items():
        weight = layout.weights[key]
        want = expected[weight.parameter] if weight.expert is None else expected[weight.parameter][weight.expert]
        assert value == pytest.approx(float(want), rel=1e-3, abs=1e-12)


def test_micro_batching_does_not_change_it_and_a_doubled_loss_is_four_times():
    model = tiny("llama")
    layout = find_layers(model)
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
    model.model.embed_tokens.weight.register_hook(lambda gradient: pytest.fail("a gradient that nobody wants"))
    fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(m.training for m in model.modules()) and not model.is_activation_checkpointing
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def test_dropout_is_off_whatever_the_mode():
    model = tiny("gpt2")
    assert model.config.resid_pdrop > 0
    expected = fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    model.train()
    assert fisher_information(model, find_layers(model), prepare_batches(model, IDS)) == expected


@pytest.mark.parametrize(
    ("where", "name"), row_and_column(["disk", "cpu", "mixed"], ["mixtral", "llama", "gpt2", "opt"])
)
def test_offloaded_it_is_the_same_to_the_last_bit(name, where, tmp_path):
    model = tiny(name)
    layout = find_layers(model)
    expected = fisher_information(model, layout, prepare_batches(model, IDS))
    model = offloaded(tiny(name), where, tmp_path)
    meta = {n for n, p in model.named_parameters() if p.device.type == "meta"}
    assert meta and (where != "mixed" or len(meta) < len(list(model.parameters())))
    layout = find_layers(model)
    before = surroundings(model)
    assert fisher_information(model, layout, prepare_batches(model, IDS)) == expected
    assert surroundings(model) == before
    assert {n for n, p in model.named_parameters() if p.device.type == "meta"} == meta
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ignore", ["model.layers.0", "model.layers.1", "*.mlp.*"])
def test_offloaded_blocks_with_nothing_to_prune_only_pass_gradients_on(ignore, tmp_path):
    model = tiny("llama")
    expected = fisher_information(model, find_layers(model, [ignore]), prepare_batches(model, IDS))
    model = offloaded(model, "disk", tmp_path)
    assert fisher_information(model, find_layers(model, [ignore]), prepare_batches(model, IDS)) == expected


def test_a_block_that_runs_twice_has_the_square_of_the_summed_gradient(tmp_path):
    def twice():
        model = tiny("llama")
        model.model.layers[2] = model.model.layers[1]
        return model

    model = twice()
    expected = restated(model, IDS)
    found = fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    model = offloaded(twice(), "disk", tmp_path)
    again = fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    assert again == found
    assert {n: pytest.approx(float(expected[f"{n}.weight"]), rel=1e-3) for n in found} == found


def test_a_run_of_a_block_on_which_the_loss_does_not_depend_changes_nothing(tmp_path):
    model = tiny("llama")
    expected = fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    offloaded(model, "disk", tmp_path)

    def again(module, args, kwargs, output):
        module.forward(*args, **kwargs)

    model.model.layers[1].register_forward_hook(again, with_kwargs=True)
    assert fisher_information(model, find_layers(model), prepare_batches(model, IDS)) == expected


@pytest.mark.parametrize("name", ["mixtral", pytest.param("llama", marks=pytest.mark.slow)])
def test_offloaded_one_block_is_in_memory_at_a_time(name, tmp_path):
    model = offloaded(tiny(name), "disk", tmp_path)
    gc.collect()
    before = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]  # of other tests
    known, most = {id(x) for x in before}, []
    gc.freeze()  # what exists by now need not be looked at again

    def look(module, args):
        kind = {tuple(p.shape) for p in module.parameters()}
        present = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and x.device.type != "meta"]
        present = [x for x in present if id(x) not in known]
        most.append(sum(tuple(p.shape) in kind for p in present) / len(list(module.parameters())))

    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(look)
    try:
        fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    finally:
        gc.unfreeze()
    assert len(most) == 3 * 3 * 2 and set(most) == {1.0}  # sequences, blocks, forward and backward


def test_an_error_leaves_an_offloaded_model_as_it_was(tmp_path):
    model = offloaded(tiny("llama").train(), "mixed", tmp_path)
    model.lm_head.weight.requires_grad_(False)
    before = surroundings(model)

    def fail(*_):
        raise OSError("the disk is gone")

    layout = find_layers(model)
    for broken in (model.model.layers[1].mlp.down_proj, model.lm_head):
        hook = broken.register_forward_pre_hook(fail)
        with pytest.raises(OSError, match="the disk is gone"):
            fisher_information(model, layout, prepare_batches(model, IDS))
        hook.remove()
        assert surroundings(model) == before


def test_blocks_that_tell_each_other_more_than_they_return_are_refused_offloaded(tmp_path):
    model = gemma3n()
    found = fisher_information(model, find_layers(model), prepare_batches(model, IDS))
    assert found["model.layers.0.self_attn.k_proj"] > 0
    offloaded(model, "cpu", tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0 changes its arguments.*without offload"):
        fisher_information(model, find_layers(model), prepare_batches(model, IDS))


def in_part(processes, name, ids, folder):
    model = tiny(name) if folder is None else offloaded(tiny(name), "disk", f"{folder}/{processes.rank}")
    return fisher_information(model, find_layers(model), prepare_batches(model, ids), processes)


def test_processes_share_the_sequences(tmp_path):
    from tests.tools import several

    with several(2) as two:
        for name, ids, folder in [("llama", IDS, None), ("mixtral", IDS, str(tmp_path)), ("gpt2", IDS[:1], None)]:
            model = tiny(name)
            expected = fisher_information(model, find_layers(model), prepare_batches(model, ids))
            first, second = two(in_part, name, ids, folder)
            assert first == second
            assert first == {n: pytest.approx(v, rel=1e-12) for n, v in expected.items()}


def test_data_without_text_are_refused_before_any_work():
    model = tiny("llama")
    batches = [*prepare_batches(model, IDS), {"inputs_embeds": torch.zeros(1, 4, 64)}]
    with pytest.raises(ValueError, match="needs text"):
        fisher_information(model, find_layers(model), batches)


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
    layout = find_layers(model)
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
