"""One file, one line, one test: an allocator added as a stranger would add it is served everywhere.

The class below is the file, the fixture the line in the table.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from hf_sparsity import SparsityConfig, make_card, make_plan, prune, save_sparse
from hf_sparsity.algorithm import NORMS, Allocator, Citation
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.cli.demo import runs
from hf_sparsity.cli.main import main
from hf_sparsity.cli.tables import algorithms_markdown
from hf_sparsity.pictures.grid import make_grid
from tests.conftest import tiny, tiny_batch

MEASURED = Counter()  # value of `power` -> blocks measured with it


@dataclass(frozen=True)
class Loud(Allocator):
    """Blocks with larger inputs keep more."""

    slope: float = 0.1
    power: float = 1.0

    name = "loud"
    paper = "https://arxiv.org/abs/2601.00001"
    summary = "blocks with larger inputs keep more"
    citation = Citation("stranger2026loud", "Loud Blocks", "A. Stranger", 2026, "2601.00001")
    needs = frozenset({NORMS})
    measure_label = "loudness of the inputs"
    only_in_assign = ("slope",)
    race_grid = {"slope": (0.05, 0.1), "power": (1.0, 2.0)}  # noqa: RUF012
    demo_options = {"power": 2.0}  # noqa: RUF012

    def measure(self, block, pruner):
        """Mean input norm to the power, one number a block."""
        MEASURED[self.power] += 1
        norms = torch.cat([layer.stats.norms for layer in block.values()])
        return dict.fromkeys(block, float(norms.mean() ** self.power))

    def assign(self, measures, sizes, target, *, group=None, probe=None):
        """`target` less `slope` for the loudest block, plus it for the others."""
        loudest = max(range(len(measures)), key=lambda i: max(measures[i].values()))
        return {n: target + self.slope * (-1 if i == loudest else 1) for i, block in enumerate(measures) for n in block}


@pytest.fixture(autouse=True)
def _line(monkeypatch):
    monkeypatch.setitem(ALLOCATORS, "loud", Loud)
    MEASURED.clear()


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [tiny_batch("llama", sequences=1, tokens=24) for _ in range(count)]


def test_config_and_command_take_its_name_and_its_hyperparameters(tmp_path, capsys):
    assert SparsityConfig(0.5, allocator={"name": "loud", "slope": 0.2}).allocator == Loud(0.2)
    with pytest.raises(ValueError, match="did you mean 'loud'"):
        SparsityConfig(0.5, allocator="lowd")
    with pytest.raises(ValueError, match="slope='steep' is not of type float"):
        SparsityConfig(0.5, allocator={"name": "loud", "slope": "steep"})
    plan = tmp_path / "plan.json"
    assert main(["plan", "demo", "--sparsity", "0.5", "--allocator", "loud:slop=1", "--output", str(plan)]) == 2
    assert "did you mean 'slope'" in capsys.readouterr().err


def test_its_card_cites_it_and_its_picture_says_what_it_measures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a card without a picture is quick
    model = tiny("llama")
    plan = make_plan(model, SparsityConfig(0.5, allocator="loud"), batches(2))
    assert plan.sparsity == pytest.approx(0.5) and len({layer.sparsity for layer in plan.layers.values()}) == 2
    save_sparse(model, tmp_path / "out", report=prune(model, plan, batches(2)))
    card = make_card(tmp_path / "out").text
    assert Loud.citation.bibtex() in card and f"(https://arxiv.org/abs/{Loud.citation.arxiv})" in card
    assert make_grid(plan).measure_name == "loudness of the inputs"


def test_it_runs_in_races_over_its_grid_and_measures_once_for_what_shares_a_measure():
    race = {"name": "race", "candidates": ("loud",), "slices": (48,), "descent": 0}
    plan = make_plan(tiny("llama"), SparsityConfig(0.5, allocator=race), batches(8))
    names = {row["name"] for row in plan.chosen["candidates"] if row["kind"] == "single"}
    assert names and names <= {f"loud(slope={s}, power={p})" for s in (0.05, 0.1) for p in (1.0, 2.0)}
    blocks = len(tiny("llama").model.layers)
    assert {1.0: blocks, 2.0: blocks} == MEASURED
    assert set(plan.story.measures) == {"loud(power=1.0)", "loud(power=2.0)"}


def test_tables_and_the_demonstration_name_it():
    row = "| | `loud` | blocks with larger inputs keep more | [2601.00001](https://arxiv.org/abs/2601.00001) |"
    assert row in algorithms_markdown().splitlines()
    assert ("loud", {"name": "loud", "power": 2.0}, None) in runs(every=True)
