"""Every code block of the README runs, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from hf_sparsity.allocators import ALLOCATORS, ROW_ALLOCATORS
from hf_sparsity.cli.main import main
from hf_sparsity.pruners import PRUNERS

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(README.read_text(encoding="utf-8"))
    return tmp_path


def test_the_commands(folder):
    commands = [line for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()]
    ours = [shlex.split(line)[1:] for line in commands if line.startswith("hf-sparsity")]
    assert len(ours) >= 6
    for arguments in ours:
        assert main(arguments) == 0, arguments
    targets = {line.split()[1] for line in commands if line.startswith("make ")}
    makefile = (README.parent / "Makefile").read_text()
    assert targets == {"demo", "test"} and all(f"\n{target}:" in makefile for target in targets)
    assert all(line.startswith(("hf-sparsity", "make ")) for line in commands), "a command that nothing runs"


def test_the_python(folder):
    code = "\n".join(block for kind, block in BLOCKS if kind == "python")
    assert code.count("\n") > 40
    exec(compile(code, "README.md", "exec"), {"__name__": __name__})
    assert {"sparse_model", "my_plan.json"} <= set(os.listdir(folder))


def test_the_table_names_every_algorithm():
    table = README.read_text(encoding="utf-8")
    for names in (ALLOCATORS, ROW_ALLOCATORS, PRUNERS):
        for name, algorithm in names.items():
            row = next(line for line in table.splitlines() if line.startswith("|") and f"| `{name}` |" in line)
            assert algorithm.paper.rsplit("/", 1)[-1] in row
