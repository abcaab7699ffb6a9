"""ELSA: its iteration restated, its zeros at the end, its checkpoints, two processes."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_sparsity import Plan, SparsityCallback, make_plan, measure_sparsity
from hf_sparsity.model.sparsity import check_zeros
from hf_sparsity.plan import LayerPlan
from hf_sparsity.recovery.elsa import STATE_FILE, Stored, keep
from hf_sparsity.recovery.schedules import Elsa
from tests.conftest import tiny
from tests.recovery.trainers import IDS, PRUNE, sparse, trainer, zeros
from tests.tools import several

NAME = "model.layers.1.mlp.up_proj.weight"


def elsa(folder, options, *more, plan=None, steps=8, name="llama", **changes):
    model = tiny(name)
    callback = SparsityCallback(plan=plan or make_plan(tiny(name), PRUNE), schedule=options)
    return trainer(model, folder, callback, *more, steps=steps, **changes), callback


class Iteration(TrainerCallback):
    """The paper's iteration on one weight, from its gradients before the callback changes them; stands before it."""

    def __init__(self, penalty, interval, end, sparsity):
        self.penalty, self.interval, self.end, self.sparsity = penalty, interval, end, sparsity
        self.z = self.u = None
        self.rate, self.expected, self.gradients = 0.0, [], []

    def project(self, values, moment=1.0):
        scores = values.double().square() * moment
        threshold = scores.flatten().sort().values[int(scores.numel() * self.sparsity)]
        return values.masked_fill(scores <= threshold, 0)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.z = self.project(model.get_parameter(NAME).detach())
        self.u = torch.zeros_like(self.z)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        weight = model.get_parameter(NAME)
        self.expected.append(weight.grad + self.rate * (weight.detach() - self.z + self.u))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        step, weight = state.global_step, model.get_parameter(NAME)
        if step % self.interval == 0 and step < self.end:
            moment = optimizer.optimizer.state[weight]["exp_avg_sq"].double()
            values = weight.detach().clone()
            self.z = self.project(values + self.u, moment / moment.mean() + 1e-6)
            self.u = self.u + values - self.z
            rate = self.penalty * 0.5 * (1 - math.cos(math.pi * step / self.end))
            self.u, self.rate = self.u * (self.rate / rate), rate


class After(TrainerCallback):
    """The gradients that the optimizer sees; stands after the callback."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.get_parameter(NAME).grad.clone())


def test_each_step_is_the_papers(tmp_path):
    plan = make_plan(tiny("llama"), PRUNE)
    iteration, after = Iteration(0.5, 2, 8, plan.layers[NAME.removesuffix(".weight")].sparsity), After()
    callback = SparsityCallback(plan=plan, schedule=Elsa(penalty=0.5, interval=2))
    run = trainer(model := tiny("llama"), tmp_path, iteration, callback, after, steps=8, max_grad_norm=0.01)
    run.train()
    assert iteration.rate > 0.3
    for step, (expected, seen) in enumerate(zip(iteration.expected, after.seen, strict=True)):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-7, msg=str(step))
    assert measure_sparsity(model).sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (Elsa(penalty=0.5, interval=2), {}),
        (Elsa(penalty=0.5, interval=2, end=6, curve="constant"), {"optim": "sgd"}),
        (Elsa(penalty=0.5, interval=3, dtype="float8_e4m3fn"), {"gradient_accumulation_steps": 2, "bf16": True}),
    ],
)
def test_the_plan_is_met_at_the_end_and_held(options, changes, tmp_path):
    class Watch(TrainerCallback):
        def __init__(self):
            self.dead = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.dead[state.global_step] = zeros(model)

    watch = Watch()
    plan = make_plan(tiny("llama"), PRUNE | {"allocator": {"name": "owl"}}, IDS[:4])
    run, callback = elsa(tmp_path, options, watch, plan=plan, **changes)
    run.train()
    end = callback.gradual.schedule.end
    assert sum(int(x.sum()) for x in watch.dead[end - 1].values()) < 100, "dense until the end"
    assert all(torch.equal(x, watch.dead[8][n]) for n, x in watch.dead[end].items())
    check_zeros(run.model)
    found = {n: x.sparsity for n, x in measure_sparsity(run.model).layers.items()}
    assert found == pytest.approx({n: x.sparsity for n, x in plan.layers.items()}, abs=0.01)
    record = run.model.config.sparsity_config["recovered"]
    assert record["method"] == "elsa" and record["options"]["penalty"] == 0.5 and record["steps"] == 8
    assert Plan.from_dict(run.model.config.sparsity_config).layers == plan.layers
    logged = [entry["residual"] for entry in run.state.log_history if "residual" in entry]
    assert logged[0] > 0.1 and logged[-1] == 0
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8"))


def test_the_penalty_pulls_the_weights_to_the_sparse_ones(tmp_path):
    """Without it the projection takes more of the weights away."""
    ends = {}
    for penalty in (1e-9, 1.0):
        run, _ = elsa(tmp_path / str(penalty), Elsa(penalty=penalty, interval=2, end=20), steps=20, optim="sgd")
        run.train()
        ends[penalty] = [x["residual"] for x in run.state.log_history if "residual" in x][-2]
    assert ends[1.0] < 0.99 * ends[1e-9]


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_it_resumes_to_the_same_weights(name, dtype, tmp_path):
    options = Elsa(penalty=0.5, interval=3, dtype=dtype)
    whole, _ = elsa(tmp_path, options, name=name)
    whole.train()
    assert not (tmp_path / "checkpoint-8" / STATE_FILE).exists()
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    part, _ = elsa(tmp_path, options, name=name)
    part.train(resume_from_checkpoint=True)
    for (key, one), other in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=key)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=STATE_FILE):
        elsa(tmp_path, options, name=name)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_pattern_is_projected_in_groups(tmp_path):
    plan = make_plan(tiny("llama"), {"pattern": "2:4", "pruner": "magnitude"})
    run, callback = elsa(tmp_path, Elsa(penalty=0.5, interval=2), plan=plan, steps=4)
    run.train()
    for mask in callback.masks.parameters.values():
        assert (mask.pruned.reshape(mask.pruned.shape[0], -1, 4).sum(2) == 2).all()


def test_layers_keep_their_largest_scores():
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert keep(scores, LayerPlan(0.5, 4, "2:4")).tolist() == [[False, True, False, True]]
    assert keep(scores, LayerPlan(0.5, 4)).tolist() == [[False, True, False, False]]  # the threshold goes too


def test_few_bits_keep_the_values():
    values = torch.randn(64, 64) * 1e-3
    for dtype, error in (("float32", 0.0), ("bfloat16", 4e-3), ("float8_e4m3fn", 0.07)):
        stored = Stored(values, dtype)
        assert stored.values.element_size() == {"float32": 4, "bfloat16": 2}.get(dtype, 1)
        large = values.abs() > 1e-4
        assert ((stored.read() - values).abs() <= error * values.abs() + 1e-12)[large].all()


def train_together(processes, folder):
    run, _ = elsa(folder, Elsa(penalty=0.5, interval=2), steps=4)
    run.train()
    check_zeros(run.model)
    return {name: parameter.detach().numpy() for name, parameter in run.model.named_parameters()}


def test_two_processes_have_the_same_weights(tmp_path):
    with several(2) as call:
        first, second = call(train_together, tmp_path)
    assert all((value == second[name]).all() for name, value in first.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "penalty=0.0"),
        ({"interval": 0}, "interval=0"),
        ({"curve": "cubic"}, "'cosine', 'constant'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"importance": "wanda"}, "importance='wanda'"),
        ({"end": 1.5}, "end=1.5"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Elsa(**options)


def test_fisher_needs_second_moments(tmp_path):
    with pytest.raises(ValueError, match="importance='magnitude'"):
        elsa(tmp_path, Elsa(interval=1, importance="fisher"), optim="sgd", steps=2)[0].train()


def test_a_sparse_model_stays_as_sparse(tmp_path):
    model = sparse()
    dead = zeros(model)
    callback = SparsityCallback(plan=make_plan(tiny("llama"), PRUNE | {"sparsity": 0.8}), schedule=Elsa(interval=2))
    trainer(model, tmp_path, callback).train()
    assert all((found | ~dead[n]).all() for n, found in zeros(model).items())
    assert measure_sparsity(model).sparsity == pytest.approx(0.8, abs=0.01)
