"""Gradual pruning beyond the plan's pruner: second moments, regrowth, budgets decided anew; on the way, and resumed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainerCallback

from hf_sparsity import Plan, SparsityCallback, make_plan, measure_sparsity
from hf_sparsity.algorithm import Allocator
from hf_sparsity.core.budget import mean_sparsity
from hf_sparsity.model.sparsity import check_zeros
from hf_sparsity.recovery.gradual import raised, regrown
from hf_sparsity.recovery.schedules import Gradual, Reallocation
from tests.conftest import tiny
from tests.recovery.trainers import IDS, PRUNE, sparse, trainer, zeros
from tests.tools import several


class Masks(TrainerCallback):
    """The held zeros after each step, which stands after the callback in the list."""

    def __init__(self, callback):
        self.callback, self.seen, self.sparsity = callback, {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        parameters = self.callback.masks.parameters
        self.seen[state.global_step] = {n: mask.pruned.clone() for n, mask in parameters.items()}
        self.sparsity[state.global_step] = self.callback.sparsity
        for name, mask in parameters.items():
            assert not model.get_parameter(name).detach()[mask.pruned].any()


def grow(folder, options, *more, plan=None, steps=9, model=None, **changes):
    model = model or tiny("llama")
    callback = SparsityCallback(plan=plan or make_plan(tiny("llama"), PRUNE), schedule=options)
    masks = Masks(callback)
    run = trainer(model, folder, callback, masks, *more, steps=steps, **changes)
    return run, masks


def test_fisher_scores_are_the_squares_times_the_second_moment(tmp_path):
    class Moments(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            name = "model.layers.0.mlp.up_proj.weight"
            weight = model.get_parameter(name)
            moment = optimizer.optimizer.state[weight]["exp_avg_sq"]
            self.scores = weight.detach().square() * moment

    moments = Moments()
    run, masks = grow(tmp_path, Gradual(start=0, end=1, interval=1, scores="fisher"), moments, steps=1)
    run.train()
    pruned = masks.seen[1]["model.layers.0.mlp.up_proj.weight"]
    count = int(pruned.sum())
    assert pytest.approx(count / pruned.numel(), abs=0.01) == 0.6
    assert torch.equal(pruned, moments.scores <= moments.scores.flatten().kthvalue(count).values)
    assert not torch.equal(zeros(sparse())["model.layers.0.mlp.up_proj.weight"], pruned), "as by magnitude"


def test_fisher_needs_second_moments(tmp_path):
    with pytest.raises(ValueError, match="mean of squared gradients"):
        grow(tmp_path, Gradual(end=2, interval=1, scores="fisher"), optim="sgd")[0].train()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("scores", ["magnitude", "wanda"])
def test_masks_regrow_where_gradients_are_large_until_the_end(pattern, scores, tmp_path):
    config = PRUNE | ({"sparsity": 0.5, "pattern": pattern} if pattern == "2:4" else {})
    plan = make_plan(tiny("llama"), config)
    options = Gradual(start=1, end=9, interval=2, scores=scores, regrow=0.5)
    run, masks = grow(tmp_path, options, plan=plan, gradient_accumulation_steps=2, steps=10)
    run.train()
    back = {t: sum(int((masks.seen[t - 2][n] & ~p).sum()) for n, p in masks.seen[t].items()) for t in (5, 7, 9)}
    assert back[5] > 0 and back[7] > 0 and back[9] == 0
    assert all(torch.equal(masks.seen[9][n], p) for n, p in masks.seen[10].items())
    if pattern == "unstructured":
        for step in (3, 5, 7, 9):
            expected = 0.6 * (1 - (1 - (step - 1) / 8) ** 3)
            assert masks.sparsity[step] == pytest.approx(expected, abs=1 / 64)
    else:
        for mask in masks.seen[9].values():
            assert (mask.reshape(mask.shape[0], -1, 4).sum(2) == 2).all()
    check_zeros(run.model)


def test_what_grows_has_the_largest_gradients(tmp_path):
    """One update with a known gradient: of what was pruned, the largest come back, as many as were dropped."""
    name = "model.layers.1.mlp.down_proj.weight"

    class Gradients(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            parameter = model.get_parameter(name)
            self.handle = parameter.register_hook(lambda g: torch.arange(g.numel(), dtype=g.dtype).view_as(g))

    run, masks = grow(
        tmp_path, Gradual(start=0, end=4, interval=1, scores="magnitude", regrow=0.4), Gradients(), steps=4
    )
    run.train()
    before, after = masks.seen[1][name], masks.seen[2][name]
    grown = (before & ~after).flatten().nonzero().flatten()
    stayed = (before & after).flatten().nonzero().flatten()
    assert len(grown) and grown.min() > stayed.max()


@dataclass(frozen=True)
class Middle(Allocator):
    """Half of the layers get more than the others: the second half of the names, so that it differs from uniform."""

    name = "middle"

    def assign(self, measures, sizes, target, *, group=None, probe=None):
        names = [name for block in measures for name in block]
        return {n: target + (0.1 if i >= len(names) / 2 else -0.1) for i, n in enumerate(names)}


@pytest.mark.parametrize("regrow", [0.0, 0.2])
def test_budgets_are_decided_anew(regrow, tmp_path):
    again = Reallocation("fisher", IDS[:2], at=(0.3, 5))
    options = Gradual(start=0, end=8, interval=2, scores="magnitude", reallocate=again, regrow=regrow)
    run, masks = grow(tmp_path, options, steps=9)
    run.train()
    plan = Plan.from_dict(run.model.config.sparsity_config)
    assert plan.config["allocator"]["name"] == "fisher" and len({x.sparsity for x in plan.layers.values()}) > 1
    assert measure_sparsity(run.model).sparsity == pytest.approx(0.6, abs=0.01)
    for step in (2, 4, 6):  # the whole goes on along the curve
        assert masks.sparsity[step] == pytest.approx(0.6 * (1 - (1 - step / 8) ** 3), abs=0.02)
    check_zeros(run.model)
    record = run.model.config.sparsity_config["recovered"]
    assert record["options"]["reallocate"] == {"allocator": "fisher", "at": [0.3, 5]}
    assert json.loads(json.dumps(record)) == record


def test_an_allocator_of_ones_own_decides_without_data(tmp_path):
    options = Gradual(end=6, interval=2, reallocate=Reallocation(Middle(), at=(2,)))
    run, _ = grow(tmp_path, options, steps=7)
    run.train()
    reached = {n: x.sparsity for n, x in measure_sparsity(run.model).layers.items()}
    assert max(reached.values()) - min(reached.values()) == pytest.approx(0.2, abs=0.01)


def test_budgets_are_raised_together():
    wanted, least, sizes = {"a": 0.2, "b": 0.8}, {"a": 0.4, "b": 0.1}, {"a": 10, "b": 30}
    result = raised(wanted, least, sizes, 0.65)
    assert mean_sparsity(result, sizes) == pytest.approx(0.65) and result["a"] == 0.4
    assert raised(wanted, {"a": 0.0, "b": 0.0}, sizes, 0.65) == wanted


def test_it_resumes_to_the_same_weights(tmp_path):
    options = Gradual(
        end=6, interval=2, scores="fisher", regrow=0.3, reallocate=Reallocation("fisher", IDS[:2], at=(2,))
    )
    whole, _ = grow(tmp_path, options, steps=8)
    whole.train()
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    part, masks = grow(tmp_path, options, steps=8)
    part.train(resume_from_checkpoint=True)
    assert min(masks.seen) == 5
    for (key, one), other in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=key)


def train_together(processes, folder, renewed):
    again = Reallocation("fisher", IDS[:2], at=(2,)) if renewed else None
    options = Gradual(end=4, interval=1, scores="fisher", regrow=0.3, reallocate=again)
    run, masks = grow(folder, options, steps=4, save_strategy="no")
    run.train()
    check_zeros(run.model)
    assert sum(int((masks.seen[2][n] & ~p).sum()) for n, p in masks.seen[3].items()) > 0
    return {name: parameter.detach().numpy() for name, parameter in run.model.named_parameters()}


@pytest.mark.parametrize("renewed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_have_the_same_masks(renewed, tmp_path):
    with several(2) as call:
        first, second = call(train_together, tmp_path, renewed)
    assert all((value == second[name]).all() for name, value in first.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gradual(scores="sparsegpt"), "scores='sparsegpt'"),
        (lambda: Gradual(regrow=1.0), "regrow=1.0"),
        (lambda: Gradual(curve="square"), "'cubic' or 'linear'"),
        (lambda: Reallocation("owl", at=()), "at least one"),
        (lambda: SparsityCallback(PRUNE, schedule=Gradual(), end=0.5), "write them into the Gradual"),
        (lambda: SparsityCallback(schedule=Gradual()), "needs a config or a plan"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        (Gradual(end=3, reallocate=Reallocation("fisher", IDS[:2], at=(8,))), PRUNE, "no update before"),
        (
            Gradual(end=3, reallocate=Reallocation("owl", IDS[:2])),
            {"pattern": "2:4", "pruner": "magnitude"},
            "unstructured",
        ),
    ],
)
def test_errors_before_the_first_step(options, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        grow(tmp_path, options, plan=make_plan(tiny("llama"), config), steps=4)[0].train()


def test_a_plan_of_another_pruner_needs_scores(tmp_path):
    plan = make_plan(tiny("llama"), {"sparsity": 0.6, "pruner": "sparsegpt"})
    with pytest.raises(ValueError, match="scores='magnitude'"):
        grow(tmp_path, Gradual(end=3, interval=1), plan=plan, steps=4)[0].train()
    run, _ = grow(tmp_path, Gradual(end=3, interval=1, scores="magnitude"), plan=plan, steps=4)
    run.train()
    check_zeros(run.model)


def test_swaps_fade_along_a_cosine():
    from hf_sparsity.model.layers import find_layers
    from hf_sparsity.recovery.gradual import GradualPruning, Schedule
    from hf_sparsity.recovery.zero_masks import ZeroMasks

    plan = make_plan(model := tiny("llama"), PRUNE)
    masks = ZeroMasks(find_layers(model).weights)
    one = GradualPruning(plan, masks, Schedule("cubic", 0, 100, 10), {}, Gradual(regrow=0.3))
    assert one._swapped(0) == 0.3 and one._swapped(100) == 0.0
    assert one._swapped(25) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))


def test_the_order_in_which_weights_come_back():
    scores = torch.tensor([[5.0, 1e-20, 2e-20, -torch.inf, -torch.inf, -torch.inf, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 0.0, 1e-9, 0.0, 3e-9, 0.0]])
    safe = torch.tensor([[True, False, False, False, False, False, False]])
    order = regrown(scores, gradient, torch.isinf(scores), safe)[0].argsort(descending=True, stable=True)
    assert order.tolist()[:5] == [0, 5, 3, 2, 1]
