"""`recover` with a teacher and to a sparsity: methods, stored answers, recipes, the command; resumed to the bit."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparsity import demo, make_card, make_plan, measure_sparsity, prune, verify
from hf_sparsity.cli import recover as command
from hf_sparsity.model.sparsity import check_zeros
from hf_sparsity.recovery.methods import Distillation, TrainByElsa, TrainToSparsity
from hf_sparsity.recovery.recipes import RECIPES, in_words, recipe
from hf_sparsity.recovery.recover import recover
from hf_sparsity.recovery.schedules import Elsa, Gradual
from tests.conftest import tiny
from tests.recovery.trainers import Cut, cut_after

START = torch.randint(3, 120, (48, 1), generator=torch.Generator().manual_seed(3))
IDS = (START + torch.arange(16) * 7) % 117 + 3
QUICK = {"steps": 6, "batch": 4, "lr": 3e-3}
CONFIG = {"sparsity": 0.7, "allocator": "owl", "pruner": "magnitude"}
GROWTH = TrainToSparsity(config=CONFIG, schedule=Gradual(end=0.7, interval=1, regrow=0.2, scores="fisher"), **QUICK)
PULLED = TrainByElsa(config=CONFIG, schedule=Elsa(penalty=0.1, interval=2, end=0.9), **QUICK)


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", [GROWTH, PULLED], ids=["gradual", "elsa"])
def test_a_dense_model_becomes_sparse_and_resumes_to_the_bit(method, tmp_path, monkeypatch):
    whole = recover(tiny("llama"), IDS, method, output_dir=tmp_path / "whole", teacher=tiny("llama"))
    with monkeypatch.context() as patch:
        cut_after(patch, 4)
        with pytest.raises(Cut):
            recover(tiny("llama"), IDS, method, output_dir=tmp_path / "cut", teacher=tiny("llama"))
    again = recover(tiny("llama"), IDS, method, output_dir=tmp_path / "cut", teacher=tiny("llama"))
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(again).items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    check_zeros(loaded)
    assert measure_sparsity(loaded).sparsity == pytest.approx(0.7, abs=0.01)
    done = loaded.config.sparsity_config["recovered"]
    assert done["method"] == method.name and done["options"]["config"]["allocator"]["name"] == "owl"
    assert done["loss"]["after"] and done["teacher"]["weights"] and done["previous"] is None
    assert verify(tmp_path / "whole").ok
    assert "while it was pruned" in str(make_card(tmp_path / "whole"))
    done = recover(tiny("llama"), IDS, method, output_dir=tmp_path / "whole", teacher=tiny("llama"))
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(done).items())
    with pytest.raises(ValueError, match="complete already, of a run with another options"):
        other = {**vars(method), "lr": 1e-3}
        recover(tiny("llama"), IDS, type(method)(**other), output_dir=tmp_path / "whole")


def sparse():
    model = tiny("llama")
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    return model


def test_distillation_from_stored_answers(tmp_path):
    teacher, options = tiny("llama"), {**QUICK, "top_k": 8}
    live = recover(sparse(), IDS, "distill", output_dir=tmp_path / "live", teacher=teacher, **options)
    stored = recover(sparse(), IDS, "distill", output_dir=tmp_path / "stored", teacher=teacher, store=True, **options)
    losses = [m.config.sparsity_config["recovered"]["loss"] for m in (live, stored)]
    assert (
        losses[0]["after"] == pytest.approx(losses[1]["after"], rel=1e-3) and losses[0]["after"] < losses[0]["before"]
    )
    assert {f.name for f in (tmp_path / "live").iterdir()} == {f.name for f in (tmp_path / "stored").iterdir()}
    done = stored.config.sparsity_config["recovered"]
    assert done["method"] == "distill" and done["options"]["store"] and done["options"]["hard"] == 0.5
    assert "store" not in live.config.sparsity_config["recovered"]["options"]


def test_distillation_trains_adapters_if_they_have_a_rank(tmp_path):
    model = recover(sparse(), IDS, Distillation(rank=4, **QUICK), output_dir=tmp_path / "out", teacher=tiny("llama"))
    zero = {n: p == 0 for n, p in sparse().named_parameters()}
    assert all(not p.detach()[zero[n]].any() for n, p in model.named_parameters() if p.ndim > 1)
    assert not hasattr(model, "peft_config")
    assert Distillation(rank=4).resolved(length=8, width=192).lr == pytest.approx(6e-3)
    assert Distillation().resolved(length=8, width=192).lr == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: recover(sparse(), IDS, "distill", output_dir=out), "pass teacher="),
        (lambda out: recover(tiny("llama"), IDS, "gradual", output_dir=out), "give plan or config"),
        (lambda out: TrainToSparsity(config=CONFIG, schedule=Elsa()), "takes Gradual"),
        (lambda out: Distillation(store=True), "give top_k"),
        (lambda out: recover(tiny("llama"), IDS, "full", output_dir=out), "no sparsity plan"),
        (lambda out: recipe(75), "one of 60, 70, 80, 90"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out")


def test_recipes_are_methods_that_may_be_changed():
    for sparsity, one in RECIPES.items():
        method = recipe(sparsity)
        assert method == one.method and method.tokens and isinstance(method, TrainToSparsity) == (sparsity >= 80)
        words = in_words(sparsity, method)
        assert f"recipe {sparsity}" in words and str(method.tokens) in words and "width" in words
    changed = recipe(80, steps=5, plan="plan.json", lr=1e-4)
    assert (changed.steps, changed.tokens, changed.plan, changed.config) == (5, None, "plan.json", None)
    with pytest.raises(TypeError):
        recipe(80, ranks=3)


@pytest.mark.slow
def test_the_example(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples" / "train_to_80.py"), "--steps", "8", "--heldout", "4"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for number, more in enumerate(([], ["--elsa"])):
        given = ["--allocator", "uniform", "--output", str(tmp_path / str(number)), *more]
        done = subprocess.run([*command, *given], capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / str(number)))


def parsed(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.add_arguments(parser)
    return parser.parse_args([str(x) for x in given])


def test_the_command_with_a_recipe(tmp_path, capsys):
    config = {"sparsity": 0.8, "allocator": "uniform", "pruner": "magnitude"}
    make_plan(AutoModelForCausalLM.from_pretrained(demo.PATH), config).save(tmp_path / "plan.json")
    shutil.copytree(demo.PATH, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(demo.texts("calibration")[0][1])
    given = [tmp_path / "dense", "--recipe", 80, "--plan", tmp_path / "plan.json", "--data", tmp_path / "text.txt"]
    given += ["--steps", 3, "--batch", 2, "--length", 32, "--output", tmp_path / "out"]
    result = command.run(parsed(*given))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("recipe 80: a dense model") and any("steps" in line and "3" in line for line in said[:6])
    assert said[-3] == "gradual: 3 steps, 192 tokens; sparse at the end"
    assert (
        result["options"]["hard"] == 0.5 and result["teacher"]["weights"] and json.loads(json.dumps(result)) == result
    )
    assert measure_sparsity(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).sparsity == pytest.approx(
        0.8, abs=0.01
    )
    for wrong, message in (
        (("--recipe", 80, "--method", "lora"), "leave --method out"),
        (("--plan", "x.json"), "belong to the methods gradual and elsa"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(parsed("model", "--data", tmp_path / "text.txt", "--output", tmp_path / "no", *wrong))
    assert not Path(tmp_path / "no").exists()
