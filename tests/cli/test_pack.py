"""`hf-sparsity pack` and `unpack`."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_sparsity import make_plan, pack, prune, save_sparse
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
    assert main(["unpack", str(tmp_path / "dense"), str(tmp_path / "other")]) == 2


def test_the_same_command_again(tmp_path, capsys):
    """It says that the output is complete and touches nothing; an output of another model is refused with what differs."""
    model = tiny("llama")
    prune(model, make_plan(model, {"sparsity": 0.7, "pruner": "magnitude"}))
    (tmp_path / "dense").mkdir()
    save_sparse(model, tmp_path / "dense")
    (tmp_path / "dense/tokenizer.json").write_text("{}")
    for command in (["pack", "dense", "packed"], ["unpack", "packed", "again"]):
        command = [command[0], *(str(tmp_path / name) for name in command[1:])]
        assert main(command) == 0 and "complete already" not in capsys.readouterr().out
        before = stamps(tmp_path)
        assert main(command) == 0 and stamps(tmp_path) == before
        assert "is complete already, of the same folder" in capsys.readouterr().out
    (tmp_path / "packed/sparsity_metrics.json").write_text("{}")  # what eval adds later
    pack(tmp_path / "dense", tmp_path / "packed")

    def refused(what, *command):
        assert main([command[0], *(str(tmp_path / name) for name in command[1:])]) == 2
        assert what in capsys.readouterr().err

    refused("it is dense", "pack", "dense", "again")
    refused("it is packed", "unpack", "packed", "packed")
    refused("packed already", "pack", "packed", "again")
    (tmp_path / "dense/tokenizer.json").write_text("[]")
    refused("tokenizer.json", "pack", "dense", "packed")
    (tmp_path / "dense/tokenizer.json").write_text("{}")
    model.model.layers[0].mlp.up_proj.weight.data[0] *= 2
    model.save_pretrained(tmp_path / "dense")
    refused("the tensor model.layers.0.mlp.up_proj.weight", "pack", "dense", "packed")
    (tmp_path / "packed/UNFINISHED").mkdir()
    refused("unfinished", "unpack", "packed", "new")


def stamps(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_nothing_is_lost_in_silence(tmp_path, caplog):
    """A folder that lacks tensors is refused; other weights and links that leave the folder are named as left out."""
    model = tiny("llama")
    prune(model, make_plan(model, {"sparsity": 0.7, "pruner": "magnitude"}))
    save_sparse(model, tmp_path / "dense")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "dense/link.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "dense/model-mtp.safetensors").write_bytes((tmp_path / "dense/model.safetensors").read_bytes())
    pack(tmp_path / "dense", tmp_path / "packed")
    assert not {"link.txt", "model-mtp.safetensors"} & {file.name for file in (tmp_path / "packed").iterdir()}
    assert "model-mtp.safetensors is left out" in caplog.text and "link.txt is left out" in caplog.text
    stored = load_file(tmp_path / "dense/model.safetensors")
    save_file(
        {k: v for k, v in stored.items() if "norm" not in k}, tmp_path / "dense/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks 7 tensors of LlamaForCausalLM.*norm"):
        pack(tmp_path / "dense", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_packed_folder_that_is_not_all_of_its_source_is_not_left_behind(tmp_path, monkeypatch):
    model = tiny("llama")
    prune(model, make_plan(model, {"sparsity": 0.7, "pruner": "magnitude"}))
    save_sparse(model, tmp_path / "dense")
    (tmp_path / "dense/preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(shutil, "copyfile", lambda *_: None)  # as on a disk that loses files
    with pytest.raises(RuntimeError, match=r"not all of .*: generation_config.json"):
        pack(tmp_path / "dense", tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


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
