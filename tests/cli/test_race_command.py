"""`hf-sparsity race` on the embedded model: the table that people see, and what `--json` has."""

from __future__ import annotations

import argparse

import pytest

from hf_sparsity import Plan
from hf_sparsity.cli import race
from hf_sparsity.cli.main import main

FEW = ["demo", "--sparsity", "0.7", "--candidates", "qkvo", "--sequences", "8", "--length", "64"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    race.add_arguments(parser)
    return parser.parse_args(arguments)


def test_it_prints_who_did_how_well_and_writes_the_plan(tmp_path, capsys):
    output = tmp_path / "plan.json"
    done = race.run(parsed(*FEW, "--search", "--budget", "20 evals", "--output", str(output)))
    said = capsys.readouterr().out
    plan = Plan.load(output)
    assert plan.chosen == done["chosen"] and plan.sparsity == pytest.approx(0.7, abs=1e-6)
    assert plan.config["allocator"]["name"] == "search" and plan.config["allocator"]["budget"] == "20 evals"
    for word in (
        "qkvo(strength=0.5)",
        "uniform",
        f"winner: {plan.chosen['winner']}",
        "certificate",
        "perplexity",
        "[",
        "tokens",
    ):
        assert word in said, word
    with pytest.raises(ValueError, match="exists"):
        race.run(parsed(*FEW, "--output", str(output)))

    sparse, text = tmp_path / "sparse", ["--sequences", "8", "--length", "64"]
    assert main(["prune", "demo", "--plan", str(output), *text, "--output", str(sparse)]) == 0
    assert "of the pruned model, there: kl" in capsys.readouterr().out
    check = ["verify", str(sparse), "--against", "demo", "--certificate"]
    assert main([*check, *text]) == 0
    assert "the same text" in capsys.readouterr().out
    assert main([*check, "--sequences", "9", "--length", "64"]) == 1
    assert "ANOTHER text" in capsys.readouterr().out


def test_mistakes_come_before_the_model_is_loaded(tmp_path):
    for more, message in (
        (["--candidates", "owll"], "unknown candidate 'owll'"),
        (["--budget", "soon"], "budget='soon'"),
        (["--metric", "accuracy"], "use 'kl' or 'loss'"),
    ):
        with pytest.raises(ValueError, match=message):
            race.run(parsed("no/such/model", "--sparsity", "0.5", *more, "--output", str(tmp_path / "plan.json")))
