"""`hf-sparsity card`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

import pytest

from hf_sparsity import SparsityConfig, make_plan, prune, save_sparse
from hf_sparsity.cli import card
from tests.conftest import tiny


@pytest.fixture
def folder(tmp_path):
    model = tiny("llama")
    report = prune(model, make_plan(model, SparsityConfig(0.5, pruner="magnitude")))
    return save_sparse(model, tmp_path / "model", report=report)


def options(*arguments) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("--json", action="store_true")
    card.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_what_it_prints(folder, capsys):
    result = card.run(options(folder, "--license", "mit", "--language", "en", "--language", "de"))
    printed = capsys.readouterr().out
    assert f"card written to {folder / 'README.md'}, picture to {folder / 'sparsity_plan.png'}" in printed
    assert "hf-sparsity eval" in printed and "names no licence" not in printed
    assert result == {
        "card": str(folder / "README.md"),
        "picture": str(folder / "sparsity_plan.png"),
        "license": "mit",
        "base_model": None,
        "results": 0,
    }
    assert (folder / "sparsity_plan.png").read_bytes().startswith(b"\x89PNG")
    assert "- en\n- de\n" in (folder / "README.md").read_text()


def test_json_prints_nothing_else(folder, capsys):
    result = card.run(options(folder, "--json"))
    assert capsys.readouterr().out == "" and json.loads(json.dumps(result))["license"] is None


def test_a_card_of_somebody_else(folder):
    (folder / "README.md").write_text("# mine")
    with pytest.raises(ValueError, match="--overwrite"):
        card.run(options(folder))
    assert card.run(options(folder, "--overwrite"))["results"] == 0
