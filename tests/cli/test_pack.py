"""`hf-sparsity pack` and `unpack`."""

from __future__ import annotations

import json

import pytest

from hf_sparsity.cli.main import main
from tests.conftest import tiny
from tests.tools import contents

GIVEN = ["prune", "demo", "--sparsity", "0.7", "--pruner", "magnitude"]


def test_there_and_back(tmp_path, capsys):
    assert main([*GIVEN, "--output", str(tmp_path / "dense")]) == 0
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    pruned, rest = 2 * 442_368, 590_784 + 768  # weights of the blocks; the embedding and what else stays dense
    share = (pruned * (0.3 + 1 / 32) + rest) / (pruned + rest)
    assert told["bytes"] / told["bytes_before"] == pytest.approx(share, abs=0.02)
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")]) == 0
    dense, again = contents(tmp_path / "dense"), contents(tmp_path / "again")
    shards = [name for name in dense if name.endswith(".safetensors")]
    assert len(shards) == 3 and all(dense[name] == again[name] for name in shards)
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed")]) == 2
    assert main(["unpack", str(tmp_path / "dense"), str(tmp_path / "other")]) == 2


def test_prune_into_a_packed_folder(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "source", max_shard_size="150KB")
    given = ["prune", str(tmp_path / "source"), "--sparsity", "0.7", "--pruner", "magnitude", "--output"]
    assert main([*given, str(tmp_path / "dense")]) == 0
    assert main([*given, str(tmp_path / "packed"), "--layout", "bitmask"]) == 0
    assert "zeros are stored as bits" in capsys.readouterr().out
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "packed") == contents(tmp_path / "again")


@pytest.mark.parametrize("command", ["pack", "unpack", "verify", "inspect", "card"])
def test_what_is_no_model(tmp_path, capsys, command):
    (tmp_path / "empty").mkdir()
    output = [str(tmp_path / "output")] if "pack" in command else []
    assert main([command, str(tmp_path / "empty"), *output]) == 2
    said = capsys.readouterr().err
    assert "empty has no config.json; give the folder of a sparse model" in said and "Errno" not in said
    assert main([command, str(tmp_path / "nowhere"), *output]) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said and "give the folder of a sparse model" in said and "Errno" not in said
    assert not (tmp_path / "output").exists()
