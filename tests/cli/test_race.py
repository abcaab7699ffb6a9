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
    page = tmp_path / "report.html"
    done = race.run(parsed(*FEW, "--search", "--budget", "20 evals", "--output", str(output), "--report", str(page)))
    said = capsys.readouterr().out
    plan = Plan.load(output)
    assert plan.chosen == done["chosen"] and plan.sparsity == pytest.approx(0.7, abs=1e-6)
    assert plan.config["allocator"]["name"] == "search" and plan.config["allocator"]["budget"] == "20 evals"
    assert f"descent from {plan.chosen['descent']['from']}: " in said
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
    with pytest.raises(ValueError, match=r"output .* complete already, of a run with other arguments: config was"):
        race.run(parsed(*FEW, "--output", str(output)))
    with pytest.raises(ValueError, match=r"other arguments: data was"):
        race.run(parsed(*FEW[:-3], "9", *FEW[-2:], "--search", "--budget", "20 evals", "--output", str(output)))
    again = race.run(parsed(*FEW, "--search", "--budget", "20 evals", "--output", str(output), "--report", str(page)))
    assert again["chosen"] == done["chosen"] and "is complete already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"report .* exists"):
        race.run(parsed(*FEW, "--output", str(tmp_path / "other.json"), "--report", str(page)))
    assert f"report written to {page}" in said and done["report"] == str(page)
    shown = page.read_text("utf-8")
    for row in plan.chosen["candidates"]:
        assert row["name"] in shown and f">{row['kl'][-1]:.4f}<" in shown
    for name, layer in plan.layers.items():
        place = f"{name[: name.index('.', len('model.layers.'))]} {name.rpartition('.')[2]}"
        assert f"{place}: planned {100 * layer.sparsity:.2f} %" in shown
    assert "The descent went from" in shown
    assert "seconds since the start" in shown and f">{plan.chosen['spent']['evals']}<" in shown

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
        (["--descent", "-1"], "descent=-1 must be a whole number, at least 0: steps"),
        (["--metric", "accuracy"], "use 'kl' or 'loss'"),
        (["--report", str(tmp_path / "report.png")], "must end in .html"),
        (["--report", str(tmp_path / "plan.html"), "--output", str(tmp_path / "plan.html")], "both go to"),
    ):
        with pytest.raises(ValueError, match=message):
            race.run(parsed("no/such/model", "--sparsity", "0.5", "--output", str(tmp_path / "plan.json"), *more))
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        race.run(parsed("no/such/model", "--sparsity", "0.5", "--output", "plan.json", "--report", "no/such/x.html"))
    assert not list(tmp_path.iterdir())
