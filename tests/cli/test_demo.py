"""`hf-sparsity demo` on a tenth of its data."""

from __future__ import annotations

import json
import sysconfig

import pytest
import torch

from hf_sparsity import Plan, demo
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.cli import demo as command
from hf_sparsity.cli.main import main


def run(capsys, *arguments, code=0):
    assert main(list(arguments)) == code
    return capsys.readouterr()


def run_json(capsys, *arguments, code=0):
    return json.loads(run(capsys, *arguments, "--json", code=code).out)


def test_the_demo(capsys, tmp_path, monkeypatch):
    """The demo on a tenth of its data: the table has uniform first; the winner is saved and drawn."""
    monkeypatch.setattr(demo, "LENGTH", 64)
    monkeypatch.setattr(command, "SEQUENCES", 8)
    library = tmp_path / "library"  # a Python whose standard library is a few short files
    for path, text in demo.texts("heldout")[:1] + demo.texts("calibration")[:30]:
        (library / path).parent.mkdir(parents=True, exist_ok=True)
        (library / path).write_text(text[:1000])
    paths = sysconfig.get_paths() | {"stdlib": str(library)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: paths)
    result = run_json(capsys, "demo", "--output", str(tmp_path / "out"))
    assert [row["allocator"] for row in result["rows"]] == ["uniform", "owl", "alphapruning", "race"]
    assert [name for name, *_ in command.runs(every=True)][: len(ALLOCATORS)] == list(ALLOCATORS)
    assert all(row["sparsity"] == pytest.approx(0.6, abs=0.01) for row in result["rows"])
    assert result["best"] == min(result["rows"], key=lambda row: row["selection"])["allocator"]
    assert (tmp_path / "out" / "sparsities.png").read_bytes()[:4] == b"\x89PNG"
    assert torch.isfinite(torch.tensor([row["heldout"] for row in result["rows"]])).all()
    assert Plan.load(tmp_path / "out") == Plan.load(tmp_path / "out" / "plan.json")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again = run(capsys, "demo", "--output", str(tmp_path / "out"))
    assert "complete already" in again.out and result["best"] in again.out
    assert run_json(capsys, "demo", "--output", str(tmp_path / "out")) == result
    other = run(capsys, "demo", "--sparsity", "0.5", "--output", str(tmp_path / "out"), code=2)
    assert "of a demo with another sparsity" in other.err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
