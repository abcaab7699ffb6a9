"""SparsityCallback: every zero held at every step, in every way of training; zeros introduced on schedule."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_sparsity import Plan, SparsityConfig, make_plan, measure_sparsity, prune
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.sparsity import check_zeros
from hf_sparsity.recovery.callback import SparsityCallback
from tests.conftest import tiny
from tests.recovery.trainers import IDS, PRUNE, sparse, trainer, zeros
from tests.tools import several

WAYS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "clipping": {"max_grad_norm": 0.01},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "adafactor": {"optim": "adafactor"},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "best": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
}


class Watch(TrainerCallback):
    """Fails at the first step at which a dead weight is not 0, its gradient is not, or its optimizer state is not."""

    def __init__(self, dead):
        self.dead, self.seen, self.moments = dead, [], True

    def check(self, model, event):
        values = dict(model.named_parameters())
        for name, dead in self.dead.items():
            assert not values[name].detach()[dead].any(), f"{event}: {name} has dead weights that are not 0"
        self.seen.append(event)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        values = dict(model.named_parameters())
        assert all(not values[n].grad[dead].any() for n, dead in self.dead.items())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.check(model, "optimizer")
        values = dict(model.named_parameters())
        for name, dead in self.dead.items():
            for value in optimizer.optimizer.state[values[name]].values():
                if isinstance(value, torch.Tensor) and value.shape == dead.shape:
                    assert not value[dead].any()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.check(model, "step")

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.check(model, "evaluation")

    def on_save(self, args, state, control, model=None, **kwargs):
        self.check(model, "saving")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.check(model, "end")


def assert_survivors_changed(before, model, dead, share=0.95):
    for name, value in model.named_parameters():
        if name in dead:
            alive = ~dead[name]
            if "experts" not in name:  # an expert that no token reached stays as it is
                assert (value.detach() != before[name])[alive].float().mean() > share, name


HOLDS = [("llama", way) for way in WAYS if way != "compile"]
HOLDS += [("gpt2", "plain"), ("mixtral", "accumulation")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "compile"), ("mixtral", "checkpointing"))]


@pytest.mark.parametrize(("name", "way"), HOLDS + SLOW)
def test_zeros_are_held_at_every_step(name, way, tmp_path):
    model = sparse(name)
    dead, before = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    watch = Watch(dead)
    trainer(model, tmp_path, SparsityCallback(), watch, **WAYS[way]).train()
    assert watch.seen.count("optimizer") == watch.seen.count("step") == 4 and watch.seen[-1] == "end"
    assert all(torch.equal(found, dead[n]) for n, found in zeros(model).items())
    assert_survivors_changed(before, model, dead)
    check_zeros(model)
    for folder in tmp_path.glob("checkpoint-*"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert all(torch.equal(found, dead[n]) for n, found in zeros(loaded).items())


def test_without_the_callback_they_are_lost(tmp_path):
    """What all the tests here would see if the callback did nothing."""
    model = sparse()
    dead = zeros(model)
    trainer(model, tmp_path).train()
    assert all(not torch.equal(found, dead[n]) for n, found in zeros(model).items())


def test_bfloat16_weights(tmp_path):
    model = sparse(dtype=torch.bfloat16)
    dead = zeros(model)
    trainer(model, tmp_path, SparsityCallback(), Watch(dead), bf16=True).train()
    assert all(torch.equal(dead[n], dead[n] & found) for n, found in zeros(model).items())


def test_inherited_momentum_is_cleaned(tmp_path):
    """An optimizer that was used on the dense weights carries momentum on what is dead now."""
    model = sparse()
    dead = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in dead:
                parameter[dead[name]] = 0
    run = trainer(model, tmp_path, SparsityCallback(), Watch(dead))
    run.optimizer = optimizer
    run.train()


def test_an_optimizer_that_mixes_coordinates(tmp_path):
    """As Muon does: dead weights move although their gradients and moments are 0."""

    class Mixing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 1e-3

    model = sparse()
    dead = zeros(model)
    run = trainer(model, tmp_path, SparsityCallback(), Watch(dead))
    run.optimizer = Mixing(model.parameters(), lr=1e-2)
    run.train()
    assert all(torch.equal(found, dead[n]) for n, found in zeros(model).items())


def test_the_masks_are_stored_not_read_again(tmp_path):
    """A survivor that becomes 0 goes on training, also over a checkpoint, also after its weights were saved as 0."""
    model = sparse()
    dead = zeros(model)
    name = "model.layers.0.mlp.up_proj.weight"
    alive = (~dead[name]).nonzero()[:3]

    class Zero(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.get_parameter(name).data[tuple(alive.T)] = 0

    trainer(model, tmp_path, SparsityCallback(), Zero(), steps=4).train()
    assert (model.get_parameter(name).detach()[tuple(alive.T)] != 0).all()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    assert (saved.get_parameter(name)[tuple(alive.T)] == 0).all()

    again, callback = sparse(), SparsityCallback()
    trainer(again, tmp_path, callback, Watch(dead)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(h.pruned, dead[n]) for n, h in callback.masks.parameters.items())
    assert (again.get_parameter(name).detach()[tuple(alive.T)] != 0).all()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_resume_is_the_run_that_was_not_interrupted(name, tmp_path):
    whole = sparse(name)
    dead = zeros(whole)
    trainer(whole, tmp_path / "a", SparsityCallback()).train()
    part = sparse(name)
    trainer(part, tmp_path / "b", SparsityCallback()).train()
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    fresh = sparse(name)  # a MoE's experts of this object are not the checkpoint's, and the Trainer keeps them
    trainer(fresh, tmp_path / "b", SparsityCallback(), Watch(dead)).train(resume_from_checkpoint=True)
    for (key, one), other in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=key)


def test_resume_with_other_weights_is_an_error(tmp_path):
    """A MoE whose checkpoint cannot be found again: no training on experts that were never trained."""
    trainer(sparse("mixtral"), tmp_path / "a", SparsityCallback()).train()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "a" / "checkpoint-2", moved)
    with pytest.raises(ValueError, match="from_pretrained"):
        trainer(sparse("mixtral"), tmp_path / "b", SparsityCallback()).train(resume_from_checkpoint=str(moved))
    loaded = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    trainer(loaded, tmp_path / "b", SparsityCallback()).train(resume_from_checkpoint=str(moved))


def test_the_best_model_of_a_moe_has_its_own_experts(tmp_path):
    """`load_best_model_at_end` keeps the last experts, silently, without us."""
    model = sparse("mixtral")
    dead = zeros(model)
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first, since the loss falls
    run = trainer(model, tmp_path, SparsityCallback(), steps=6, **WAYS["best"] | worst)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-6", "the last is the best: nothing is tested"
    loaded = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), loaded.parameters(), strict=True))
    assert all(torch.equal(found, dead[n]) for n, found in zeros(model).items())


def test_a_restored_callback_goes_on(tmp_path):
    model = sparse()
    dead = zeros(model)
    trainer(model, tmp_path, SparsityCallback()).train()
    again = sparse()
    run = trainer(again, tmp_path, SparsityCallback(), steps=6, restore_callback_states_from_checkpoint=True)
    run.add_callback(Watch(dead))
    run.train(resume_from_checkpoint=True)
    assert all(torch.equal(found, dead[n]) for n, found in zeros(again).items())


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    model = sparse()
    trainer(model, tmp_path, steps=2).train()
    with torch.no_grad():
        pruned = sparse()
    pruned.save_pretrained(tmp_path / "checkpoint-2")
    dead = zeros(pruned)
    trainer(sparse(), tmp_path, SparsityCallback(), Watch(dead)).train(resume_from_checkpoint=True)


class Tracker(TrainerCallback):
    """Stands where `report_to` puts its trackers: before what the user passes."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("way", ["in the list", "added in front", "passed and moved to the front"])
def test_logs_have_the_sparsity(way, tmp_path, caplog):
    model, callback, before, after = sparse(), SparsityCallback(), Tracker(), Tracker()
    run = trainer(model, tmp_path, before, *([] if way == "added in front" else [callback]), after)
    if way != "in the list":
        callback.add_to(run)
    run.args.report_to = ["a tracker"]  # as the callback knows them
    run.train()
    told = "a tracker log before this callback" in caplog.text
    assert told is (way == "in the list")
    assert sum(x is callback for x in run.callback_handler.callbacks) == 1
    expected = pytest.approx([measure_sparsity(model).sparsity] * 4)
    assert [x["sparsity"] for x in run.state.log_history if "loss" in x] == expected
    for tracker in [after] if way == "in the list" else [before, after]:
        assert [x["sparsity"] for x in tracker.logs if "loss" in x] == expected


# ---- gradual


class Growth(TrainerCallback):
    """Records, step by step, which weights are 0, and that none comes back."""

    def __init__(self):
        self.dead, self.sparsity = None, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = zeros(model)
        if self.dead is not None:
            assert all(now[n][dead].all() for n, dead in self.dead.items()), "a dead weight came back"
        self.dead = now
        total = sum(x.numel() for x in now.values())
        self.sparsity[state.global_step] = sum(int(x.sum()) for x in now.values()) / total


GROWS = [("magnitude", way) for way in ("plain", "best")]
GROWS += [("wanda", way) for way in ("plain", "accumulation", "bf16", "checkpointing", "best")]
SLOW = [pytest.param("wanda", "compile", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("pruner", "way"), GROWS + SLOW)
def test_gradual_pruning_follows_the_schedule(pruner, way, tmp_path):
    model, growth = tiny("llama"), Growth()
    callback = SparsityCallback({"sparsity": 0.7, "pruner": pruner}, schedule="cubic", start=1, end=7, interval=2)
    trainer(model, tmp_path, callback, growth, steps=9, **WAYS[way]).train()
    for step, sparsity in growth.sparsity.items():
        at = min(step - (step - 1) % 2, 7)
        expected = 0.7 * (1 - (1 - (at - 1) / 6) ** 3)
        assert sparsity == pytest.approx(expected, abs=1 / 64), step  # rows are cut by whole weights
    one_shot = tiny("llama")
    report = prune(one_shot, plan := make_plan(one_shot, {"sparsity": 0.7, "pruner": pruner}), IDS)
    found = measure_sparsity(model)
    assert {n: x.zeros for n, x in found.layers.items()} == {n: x.zeros for n, x in report.layers.items()}
    assert Plan.from_dict(model.config.sparsity_config).layers == plan.layers
    check_zeros(model)
    survivors = [p.detach()[~growth.dead[n]] for n, p in model.named_parameters() if n in growth.dead]
    assert all((x != 0).all() for x in survivors)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_gradual_pruning_of_other_layouts(pruner, name, tmp_path):
    model, growth = tiny(name), Growth()
    config = SparsityConfig(0.6, pruner=pruner)
    trainer(model, tmp_path, SparsityCallback(config, schedule="linear", end=4, interval=1), growth, steps=5).train()
    assert growth.sparsity[2] == pytest.approx(0.3, abs=1 / 64)
    assert measure_sparsity(model).sparsity == pytest.approx(0.6, abs=1 / 64)
    check_zeros(model)


@pytest.mark.parametrize("pattern", ["2:4", "*:8"])
def test_gradual_pruning_into_groups(pattern, tmp_path):
    model = tiny("llama")
    config = SparsityConfig(None if pattern == "2:4" else 0.5, pattern=pattern, pruner="magnitude")
    trainer(model, tmp_path, SparsityCallback(config, schedule="cubic", end=4, interval=1), Growth(), steps=5).train()
    kept, group = (2, 4) if pattern == "2:4" else (4, 8)
    for weight in find_layers(model).weights.values():
        assert ((weight.read() != 0).reshape(weight.shape[0], -1, group).sum(2) == kept).all()


def test_wanda_sees_the_inputs_and_magnitude_does_not(tmp_path):
    """Columns whose input is always 0 are the first to go, however large their weights are."""
    ends = {}
    for pruner in ("magnitude", "wanda"):
        model = tiny("llama")
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[:16] = 0
        model.model.layers[0].input_layernorm.weight.requires_grad_(False)
        callback = SparsityCallback(SparsityConfig(0.3, pruner=pruner), schedule="cubic", end=3, interval=1)
        trainer(model, tmp_path / pruner, callback, steps=3).train()
        ends[pruner] = (model.model.layers[0].self_attn.q_proj.weight[:, :16] == 0).float().mean().item()
    assert ends["wanda"] == 1 and ends["magnitude"] < 0.6


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_gradual_pruning_resumes(pruner, tmp_path):
    def run(model, folder, **changes):
        callback = SparsityCallback(SparsityConfig(0.6, pruner=pruner), schedule="cubic", end=6, interval=2)
        return trainer(model, folder, callback, growth := Growth(), steps=8, **changes), growth

    whole, _ = run(tiny("llama"), tmp_path / "a")
    whole.train()
    shutil.rmtree(tmp_path / "a" / "checkpoint-8")
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    resumed, growth = run(fresh := tiny("llama"), tmp_path / "a")
    resumed.train(resume_from_checkpoint=True)
    assert min(growth.sparsity) == 5
    check_zeros(fresh)
    if pruner == "magnitude":  # running norms begin anew
        for (key, one), other in zip(whole.model.named_parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=key)


def test_the_best_model_is_one_that_is_sparse_enough(tmp_path):
    """Every evaluation before the schedule's end is better here, since the loss only grows."""
    model = tiny("llama")
    callback = SparsityCallback(SparsityConfig(0.9, pruner="magnitude"), schedule="linear", end=6, interval=1)
    best = WAYS["best"] | {"learning_rate": 1e-6, "eval_steps": 1, "save_steps": 1}
    run = trainer(model, tmp_path, callback, steps=8, **best)
    run.train()
    losses = [x["eval_loss"] for x in run.state.log_history if "eval_loss" in x]
    assert min(losses) not in losses[5:], "the dense model is not the best: nothing is tested"
    assert int(run.state.best_model_checkpoint.rsplit("-")[-1]) >= 6
    check_zeros(AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint))
    check_zeros(model)


@pytest.mark.parametrize(("pruner", "target"), [("magnitude", 0.8), ("wanda", 0.62)])
def test_a_sparse_model_is_made_sparser(pruner, target, tmp_path):
    """Magnitude left rows with more zeros than wanda's share of a row: they stay dead all the same."""
    model = sparse()
    dead = zeros(model)
    callback = SparsityCallback(SparsityConfig(target, pruner=pruner), schedule="cubic", end=4, interval=1)
    trainer(model, tmp_path, callback, Watch(dead), growth := Growth(), steps=5).train()
    assert growth.sparsity[1] > 0.6 and target - 0.01 < measure_sparsity(model).sparsity < target + 0.05
    assert model.config.sparsity_config["config"]["sparsity"] == target


def test_a_run_that_stops_early_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    callback = SparsityCallback(SparsityConfig(0.6, pruner="magnitude"), schedule="cubic", end=4, interval=1)
    with caplog.at_level(logging.WARNING):
        trainer(model := tiny("llama"), tmp_path, callback, Stop(), steps=5).train()
    assert "before the sparsity schedule's end at 4" in caplog.text
    reached = Plan.from_dict(model.config.sparsity_config)  # what it has, not what it should have had
    assert 0 < reached.target < 0.6 and reached.target == pytest.approx(measure_sparsity(model).sparsity)
    check_zeros(model)


# ---- two processes


def train_together(processes, folder, mode):
    """Trains this process's share: with `hold` a sparse model, else a dense one that the pruner of that name thins."""
    growth = Growth()
    if mode == "hold":
        model = sparse()
        calls = [SparsityCallback(), Watch(zeros(model))]
    else:
        model = tiny("llama")
        calls = [SparsityCallback(SparsityConfig(0.6, pruner=mode), schedule="cubic", end=3, interval=1), growth]
    run = trainer(model, folder, *calls, gradient_accumulation_steps=2)
    run.train()
    assert run.args.world_size == 2
    check_zeros(model)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["hold", "wanda"])
def test_two_processes_hold_the_same_weights(mode, tmp_path):
    with several(2) as call:
        first, second = call(train_together, tmp_path / "out", mode)
    assert all((value == second[name]).all() for name, value in first.items())
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4"))


SCRIPT = """
import sys, torch
from tests.recovery.test_callback import train_together
torch.set_num_threads(1)
for value in train_together(None, *sys.argv[1:]).values():
    here = torch.from_numpy(value.copy())
    torch.distributed.broadcast(here, 0)
    assert (here.numpy() == value).all(), "the processes differ"
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


SHARDED = """
import sys, types, torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import TrainerControl, TrainerState
from tests.recovery.test_callback import *
from tests.recovery.trainers import IDS, sparse
from tests.recovery.test_callback import tiny
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
mesh = torch.distributed.init_device_mesh("cpu", (2,))
arguments = trainer(tiny("gpt2"), sys.argv[1]).args
name, mode = sys.argv[2].split("-")
model = sparse(name) if mode == "hold" else tiny(name)
dead = {n: p.detach() == 0 for n, p in model.named_parameters() if mode == "hold" and p.ndim > 1}
plan = make_plan(model, PRUNE) if mode == "grow" else None
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for block in find_layers(model).blocks:
    fully_shard(block.module, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
grow = {"schedule": "cubic", "start": 0, "end": 3, "interval": 1} if mode == "grow" else {}
callback = SparsityCallback(plan=plan, **grow)
state, control = TrainerState(max_steps=4), TrainerControl()
given = {"model": model, "optimizer": optimizer}
callback.on_train_begin(arguments, state, control, **given)
for step in range(4):
    for micro in range(2):
        model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
    for held in callback.masks.parameters.values():
        assert not held.parameter.grad.to_local()[held.pruned].any()
    optimizer.step()
    callback.on_optimizer_step(arguments, state, control, **given)
    state.global_step += 1
    callback.on_step_end(arguments, state, control, **given)
    optimizer.zero_grad()
    values = {n: p.detach().full_tensor() for n, p in model.named_parameters()}
    assert all(not values[n][gone].any() for n, gone in dead.items())
    for held in callback.masks.parameters.values():
        whole, gone = held.whole()
        assert not whole[gone].any() and int(gone.sum()) == held.zeros
assert abs(callback.sparsity - 0.6) < 0.01
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["llama-hold", "gpt2-hold", "mixtral-hold", "llama-grow", "mixtral-grow"])
def test_sharded_parameters(mode, tmp_path):
    """FSDP2 on two processes, with its mixed precision and accumulation; no Trainer, which shards on GPUs only."""
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(tmp_path / "out"), mode]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hold", "wanda", "magnitude"])
def test_two_launched_processes(mode, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # Without `--multi_gpu` accelerate starts one process on a CPU; `use_cpu` in the script makes it gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(tmp_path / "out"), mode]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4"))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": PRUNE}, "schedule"),
        ({"schedule": "cubic"}, "needs a config or a plan"),
        ({"config": PRUNE, "schedule": "exponential"}, "'cubic' or 'linear'"),
        ({"config": PRUNE, "schedule": "cubic", "end": 1.5}, "share of the run"),
        ({"config": PRUNE, "schedule": "cubic", "start": -1}, "start=-1"),
        ({"config": PRUNE, "schedule": "cubic", "interval": 0}, "interval=0"),
        ({"config": PRUNE, "plan": {}, "schedule": "cubic"}, "not both"),
    ],
)
def test_contradictory_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityCallback(**arguments)


def gradual(**config):
    return SparsityCallback(PRUNE | config, schedule="cubic", **({"end": 3}))


def without_plan(model):
    del model.config.sparsity_config
    return model


@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (lambda: tiny("llama"), SparsityCallback, "no zeros to hold"),
        (lambda: sparse("gpt2"), lambda: SparsityCallback(plan=make_plan(tiny("llama"), PRUNE)), "another model"),
        (
            lambda: without_plan(sparse()),
            lambda: SparsityCallback(plan=make_plan(tiny("llama"), {"sparsity": 0.9, "pruner": "magnitude"})),
            "where the plan says 0.9",
        ),
        (lambda: sparse(dtype=torch.float16), SparsityCallback, "float16"),
        (lambda: tiny("llama"), lambda: gradual(pruner="sparsegpt"), "'magnitude' or 'wanda'"),
        (lambda: tiny("llama"), lambda: gradual(pruner={"name": "wanda", "variant": True}), "variant=False"),
        (lambda: tiny("llama"), lambda: gradual(allocator="owl"), "pass plan=make_plan"),
        (lambda: tiny("llama"), lambda: SparsityCallback(PRUNE, schedule="cubic", end=400), "a run of 4 steps"),
    ],
)
def test_errors_before_the_first_step(model, callback, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(model(), tmp_path, callback()).train()


def test_a_model_without_a_plan_is_held_by_its_zeros(tmp_path):
    model = without_plan(sparse())
    trainer(model, tmp_path, SparsityCallback(), Watch(zeros(model))).train()


def test_quantized_and_adapted_models_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(sparse(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="sparse_lora"):
        trainer(model, tmp_path, SparsityCallback()).train()
    model = sparse()
    callback, args = SparsityCallback(), trainer(model, tmp_path).args
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        callback.on_train_begin(args, None, None, model=model)


def test_the_state_is_plain_json(tmp_path):
    callback = SparsityCallback(PRUNE, schedule="cubic", end=3)
    trainer(tiny("llama"), tmp_path, callback).train()
    state = json.loads(json.dumps(callback.state()))
    again = SparsityCallback(**state["args"])
    assert again.state()["args"] == callback.state()["args"]


@pytest.mark.slow
def test_the_example(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples" / "recover_with_trainer.py"), "--steps", "5", "--heldout", "4"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
