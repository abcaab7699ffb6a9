"""`hf-sparsity pack` and `unpack`."""

from __future__ import annotations

import json

import pytest

from hf_sparsity.cli.main import main
from tests.hf.test_output import contents

GIVEN = ["prune", "demo", "--sparsity", "0.7", "--pruner", "magnitude"]


def test_there_and_back(tmp_path, capsys):
    assert main([*GIVEN, "--output", str(tmp_path / "dense")]) == 0
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] / told["bytes_before"] == pytest.approx(0.45, abs=0.02)  # 36 % of 3.4M weights; the embedding
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")]) == 0
    dense, again = contents(tmp_path / "dense"), contents(tmp_path / "again")
    shards = [name for name in dense if name.endswith(".safetensors")]
    assert len(shards) == 9 and all(dense[name] == again[name] for name in shards)
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed")]) == 2
    assert main(["unpack", str(tmp_path / "dense"), str(tmp_path / "other")]) == 2
