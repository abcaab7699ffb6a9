"""The hf-sparsity command, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_sparsity import Plan, Report
from hf_sparsity.cli.arguments import parse_algorithm
from hf_sparsity.cli.main import main
from tests.conftest import tiny

SMALL = ["--sequences", "4", "--length", "64"]


def run(capsys, *arguments, code=0):
    assert main(list(arguments)) == code
    return capsys.readouterr()


def run_json(capsys, *arguments, code=0):
    return json.loads(run(capsys, *arguments, "--json", code=code).out)


def test_plan_then_prune_then_inspect_then_eval(capsys, tmp_path):
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    made = run_json(
        capsys, "plan", "demo", "--sparsity", "0.6", "--allocator", "owl:outlier=7,spread=0.1", "--output", plan, *SMALL
    )
    assert made["layers"] == 14 and made["sparsity"] == pytest.approx(0.6, abs=1e-6)
    assert Plan.load(plan).config["allocator"] == {
        "name": "owl",
        "outlier": 7,
        "spread": 0.1,
        "group_spread": 2.0,
        "per": "block",
    }

    text = run(capsys, "prune", "demo", "--plan", plan, "--output", out, *SMALL).out
    assert (
        "to prune: 14 layers in 2 blocks" in text
        and "stays dense: 2 x outside the blocks" in text
        and "memory: about" in text
    )
    assert Plan.load(out) == Plan.load(plan)
    assert Report.load(tmp_path / "out" / "sparsity_report.json").sparsity == pytest.approx(0.6, abs=0.01)
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
    }
    with safe_open(tmp_path / "out" / "model-00001-of-00003.safetensors", framework="pt") as tensors:
        zeros = float((tensors.get_tensor("model.layers.0.mlp.up_proj.weight") == 0).float().mean())
    assert zeros == pytest.approx(Plan.load(plan).layers["model.layers.0.mlp.up_proj"].sparsity, abs=1 / 192)

    shown = run_json(capsys, "inspect", out)
    assert shown["reached"] == pytest.approx(0.6, abs=0.01) and shown["planned"] == pytest.approx(0.6, abs=1e-6)
    table = run(capsys, "inspect", out).out
    assert "model.layers.1" in table and "down_proj" in table and "measure" in table
    assert "model.layers.1" in run(capsys, "inspect", plan).out

    few = ["--windows", "2", "--length", "64", "--text", __file__]
    (text,) = run_json(capsys, "eval", out, "--against", "demo", *few)["texts"]
    against = text["against"]
    assert against["kl"]["value"] > 0 and 0 < against["top1"]["value"] < 1
    assert text["perplexity"]["value"] > against["perplexity"]["value"]
    (dense,) = run_json(capsys, "eval", "demo", "--against", "demo", *few)["texts"]
    assert dense["against"]["kl"]["value"] == pytest.approx(0, abs=1e-6) and dense["against"]["top1"]["value"] == 1
    assert dense["perplexity"]["value"] == pytest.approx(against["perplexity"]["value"])


def test_prune_in_one_go_without_data_or_tokenizer(capsys, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "dense")
    done = run_json(
        capsys,
        "prune",
        str(tmp_path / "dense"),
        "--sparsity",
        "0.5",
        "--pruner",
        "magnitude",
        "--output",
        str(tmp_path / "out"),
    )
    assert done["sparsity"] == pytest.approx(0.5, abs=0.01)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert float((model.transformer.h[0].mlp.c_fc.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "70"], "0.7, not 70"),
        (["--sparsity", "0.7", "--pattern", "2:4"], "contradicts"),
        (["--sparsity", "0.5", "--allocator", "olw"], "did you mean 'owl'"),
        (["--sparsity", "0.5", "--allocator", "owl:lambda=1"], "no hyperparameter 'lambda'"),
        (["--sparsity", "0.5", "--allocator", "owl:spread"], "KEY=VALUE"),
        (["--sparsity", "0.5", "--ignore", "qq_proj"], "matches no layer"),
        (["--sparsity", "0.5", "--calibration", "missing.txt"], "missing.txt"),
        ([], "sparsity is missing"),
        (["--pattern", "2:7"], "does not divide"),
    ],
)
def test_wrong_input_is_exit_code_2_and_writes_nothing(capsys, tmp_path, arguments, message):
    shown = run(capsys, "prune", "demo", "--output", str(tmp_path / "out"), *SMALL, *arguments, code=2)
    assert message in shown.err and "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_never_overwritten(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert (
        "not an empty folder"
        in run(capsys, "prune", "demo", "--sparsity", "0.5", "--output", str(tmp_path), code=2).err
    )
    plan = tmp_path / "notes.txt"
    assert "exists" in run(capsys, "plan", "demo", "--sparsity", "0.5", "--output", str(plan), code=2).err
    assert plan.read_text() == "mine"


def test_a_truncated_plan_and_a_missing_model(capsys, tmp_path):
    (tmp_path / "plan.json").write_text('{"version": 1, "config": {"spar')
    shown = run(
        capsys, "prune", "demo", "--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path / "out"), code=2
    )
    assert "truncated or not JSON" in shown.err
    assert "error" in run_json(capsys, "inspect", str(tmp_path / "nowhere"), code=2)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_and_the_run_goes_on(capsys, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    given = ["prune", "demo", "--sparsity", "0.5", "--pruner", "magnitude", "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("hf_sparsity.checkpoint.atomic.save_file", full)
        shown = run(capsys, *given, code=1)
    assert "No space left" in shown.err and "start the same command again" in shown.err
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["UNFINISHED"]
    run(capsys, *given)
    assert not (tmp_path / "out" / "UNFINISHED").exists()


def test_algorithms_on_the_command_line():
    assert parse_algorithm("owl") == "owl" and parse_algorithm(None) is None
    assert parse_algorithm("a:b=1,c=0.5,d=true,e=none,f=peak") == {
        "name": "a",
        "b": 1,
        "c": 0.5,
        "d": True,
        "e": None,
        "f": "peak",
    }


def test_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "hf_sparsity", "--help"], capture_output=True, text=True, check=True)
    assert "inspect" in shown.stdout
    assert subprocess.run([sys.executable, "-m", "hf_sparsity", "bake"], capture_output=True).returncode == 2
