"""Pruning into a packed folder: the bytes that packing the dense folder gives, whenever the run was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import transformers as hf

from hf_sparsity import SparseModel, make_plan, prune
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.files import MARKER
from hf_sparsity.publish.layouts import pack
from tests.conftest import Stopped, stop_after, tiny
from tests.tools import contents

CONFIG = {"sparsity": 0.6, "pruner": "magnitude"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`source`; `dense`, pruned from it; `packed`, packed from that."""
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(folder / "source", max_shard_size="150KB")
    into(folder / "source", Output(folder / "dense"))
    pack(folder / "dense", folder / "packed")
    return folder


def into(source, output, stream=False):
    model = open_streamed(source) if stream else hf.AutoModelForCausalLM.from_pretrained(source)
    return prune(model, make_plan(model, CONFIG), output_dir=output)


@pytest.mark.parametrize("stream", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bytes(folders, stream, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        into(folders / "source", Output(out, layout="bitmask", after_record=stop_after(2)), stream)
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    with pytest.raises(ValueError, match='layout was "bitmask"'):
        into(folders / "source", Output(out), stream)
    into(folders / "source", Output(out, layout="bitmask"), stream)
    expected = contents(folders / "packed")
    if stream:
        expected.pop("generation_config.json", None)
    found = contents(out)
    assert {name: found[name] for name in expected} == expected and not (out / MARKER).exists()


@pytest.mark.parametrize("last", ["remove", "rename", "rmtree"])
def test_a_run_killed_in_its_last_steps(folders, last, tmp_path, monkeypatch):
    """Before the dense files are given up it goes on; after that the folder is complete."""
    out = tmp_path / "out"

    def stop(*given):
        raise Stopped

    def at_the_end(record):
        if record["what"] == "complete":
            if last == "rmtree":
                shutil.rmtree(out / MARKER / "packed")
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if last == "rename":
            rename = os.rename
            patch.setattr(os, "rename", lambda a, b: stop() if str(b).endswith("packed") else rename(a, b))
        into(folders / "source", Output(out, layout="bitmask", after_record=at_the_end))
    assert (out / "config.json").exists() and (out / MARKER).is_dir()
    if last == "rename":
        into(folders / "source", Output(out, layout="bitmask"))
    else:
        if last == "remove":  # what is complete is so whoever asks
            with pytest.raises(ValueError, match="complete already, of a run with another layout"):
                into(folders / "source", Output(out))
        into(folders / "source", Output(out, layout="bitmask"))
    assert contents(out) == contents(folders / "packed")


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_the_config_comes_when_all_else_is_there(folders, layout, tmp_path, monkeypatch):
    """Nothing loads a folder without one."""
    out, replace = tmp_path / "out", os.replace

    def stop_before_config(source, target):
        if Path(target) == out / "config.json":
            raise Stopped
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(os, "replace", stop_before_config)
        into(folders / "source", Output(out, layout=layout))
    expected = contents(folders / ("packed" if layout == "bitmask" else "dense"))
    there = {path.name for path in out.iterdir()} - {MARKER}
    assert there == expected.keys() - {"config.json"}
    into(folders / "source", Output(out, layout=layout))
    assert contents(out) == expected


def test_from_pretrained_writes_it(folders, tmp_path):
    SparseModel.from_pretrained(
        folders / "source", sparsity_config=CONFIG, output_dir=tmp_path / "out", layout="bitmask"
    )
    found, expected = contents(tmp_path / "out"), contents(folders / "packed")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == ["config.json"]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", folders / "packed")]
    assert "plan" in configs[0]["sparsity_config"]["pruned"]["arguments"]  # this run has planned as well
    for config in configs:
        del config["sparsity_config"]["pruned"]["arguments"]
    assert configs[0] == configs[1]
    assert SparseModel.from_pretrained(tmp_path / "out").config.sparsity_config["config"]["sparsity"] == 0.6


def test_refusals(folders, tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match="layout 'zip'"):
        Output(tmp_path / "out", layout="zip")
    with pytest.raises(ValueError, match="give output_dir"):
        SparseModel.from_pretrained(folders / "source", sparsity_config=CONFIG, layout="bitmask")
    with pytest.raises(ValueError, match="nothing worth packing"):
        plan = make_plan(model, CONFIG | {"sparsity": 0.02})
        prune(model, plan, output_dir=Output(tmp_path / "out", layout="bitmask"))
    assert list(tmp_path.iterdir()) == []
