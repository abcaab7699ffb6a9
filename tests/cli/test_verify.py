"""`hf-sparsity verify`: what is printed, and exit codes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from hf_sparsity import make_plan, prune, save_sparse
from hf_sparsity.cli.main import main
from tests.conftest import tiny


@pytest.fixture
def folders(tmp_path):
    """(dense, sparse), both with one shard."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    report = prune(model, make_plan(model, {"sparsity": 0.5, "pruner": "magnitude"}))
    save_sparse(model, tmp_path / "sparse", report=report)
    return str(tmp_path / "dense"), str(tmp_path / "sparse")


def test_a_folder_that_holds_what_it_says(folders, capsys):
    dense, sparse = folders
    assert main(["verify", sparse, "--against", dense]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{sparse}: holds what it says; sparsity 0.5002 (target 0.5000), 21 layers"
    assert "  ok      survivors     all " in "\n".join(lines) and "FAILED" not in "\n".join(lines)
    assert main(["verify", sparse, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_folder_that_does_not(folders, capsys):
    _, sparse = folders
    model = hf.AutoModelForCausalLM.from_pretrained(sparse)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save_pretrained(sparse)
    capsys.readouterr()
    assert main(["verify", sparse]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "does NOT hold what it says" in lines[0]
    assert sum(line.startswith("  FAILED") for line in lines) == 20
    assert "  and 22 more (--json lists all)" in lines
    assert lines[-1].startswith("  note    explanation   all 21 layers lost their zeros altogether")
    assert main(["verify", sparse, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and sum(f["status"] == "failed" for f in told["findings"]) == 42


def test_bad_input(folders, capsys):
    dense, sparse = folders
    assert main(["verify", dense]) == 2
    assert "not a sparse model" in capsys.readouterr().err
    assert main(["verify", sparse + "x"]) == 2
    assert main(["verify", sparse, "--against", "demo"]) == 2
    assert "against is another model" in capsys.readouterr().err
