"""The card of a model that was pruned on a calibration mix: a row for each source, and the command that mixes again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hf_sparsity import Source, SparsityConfig, calibration_batches, make_plan, prune, save_sparse
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.cli.arguments import parse_source
from hf_sparsity.cli.main import build_parser
from hf_sparsity.plan import read_json, write_json
from hf_sparsity.publish.card.commands import commands
from hf_sparsity.publish.card.make_card import CARD, make_card
from hf_sparsity.publish.card.markdown import decimals, percent
from hf_sparsity.publish.card.model_facts import read_facts
from tests.conftest import tiny


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without matplotlib a card has a table in place of the picture, which takes most of the time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def sparse(path: Path, allocator: object = "uniform", sequences: int = 16) -> Path:
    """A model pruned on web, code and samples of its own."""
    model, draw = tiny("llama"), torch.Generator().manual_seed(0)
    texts = {name: torch.randint(low, low + 40, (40, 16), generator=draw) for name, low in (("web", 5), ("code", 60))}
    given = [Source(texts["web"], 2, "web"), Source(texts["code"], 1, "my code.jsonl"), Source("self", 1)]
    mix = calibration_batches(given, model=model, sequences=sequences, length=16)
    report = prune(model, make_plan(model, SparsityConfig(0.6, allocator=allocator), mix), mix)
    return save_sparse(model, path, report=report)


def test_a_row_for_each_source(tmp_path):
    folder = sparse(tmp_path / "model")
    make_card(folder)
    card = (folder / CARD).read_text()
    section = card.partition("## Source by source")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    for name, found in read_json(folder / REPORT_FILE)["sources"].items():
        shown = [found["kl"], found["perplexity"]["dense"], found["perplexity"]["pruned"]]
        assert [f"`{name}`", percent(found["weight"]), str(found["sequences"]), *map(decimals, shown)] in rows
    assert len(rows) == 3 and len(card.split("## Source by source")) == 2


@pytest.mark.parametrize("allocator", ["uniform", "owl", {"name": "race", "candidates": ["qkvo"]}])
def test_the_command_asks_for_the_same_mix(tmp_path, allocator):
    folder = sparse(tmp_path / "model", allocator)
    (command,) = commands(read_facts(folder))
    options = build_parser().parse_args(command[1:])
    assert [parse_source(one) for one in options.calibration] == [
        {"data": "CALIBRATION_TEXT", "weight": 0.5, "name": "web"},
        {"data": "CALIBRATION_TEXT", "weight": 0.25, "name": "my code.jsonl"},
        {"data": "self", "weight": 0.25},
    ]
    assert (options.sequences, options.length) == (16, 16)
    make_card(folder)
    assert "`CALIBRATION_TEXT` stands for the text" in (folder / CARD).read_text()


def test_without_a_mix_nothing_is_said(tmp_path):
    folder = sparse(tmp_path / "model")
    report = read_json(folder / REPORT_FILE)
    del report["sources"]
    write_json(folder / REPORT_FILE, report)
    make_card(folder)
    card = (folder / CARD).read_text()
    assert "Source by source" not in card and "--calibration CALIBRATION_TEXT --sequences" in card


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["kl"], "a | b", "kl of a measurement is 'a | b'; a finite number is expected"),
        (["perplexity"], 3, "the scores of a source are damaged: weight"),
        (["weight"], None, "weight of a measurement is None"),
        (["sequences"], True, "sequences of a measurement is True; a whole number is expected"),
        ([], [], "the scores of a source are damaged: weight"),
    ],
)
def test_a_damaged_report_is_refused(tmp_path, path, value, message):
    folder = sparse(tmp_path / "model")
    report = read_json(folder / REPORT_FILE)
    if path:
        report["sources"]["web"][path[0]] = value
    else:
        report["sources"]["web"] = value
    write_json(folder / REPORT_FILE, report)
    with pytest.raises(ValueError, match=message.replace("|", "[|]")):
        make_card(folder)


def test_a_hostile_name_stays_a_name(tmp_path):
    folder = sparse(tmp_path / "model")
    report = read_json(folder / REPORT_FILE)
    report["sources"] = {"<script>|`x`\n# Title; rm -rf /": report["sources"]["web"]}
    write_json(folder / REPORT_FILE, report)
    make_card(folder)
    card = (folder / CARD).read_text()
    assert "\n# Title" not in card and "'<script>|`x` # Title; rm -rf /=CALIBRATION_TEXT@0.5'" in card
