"""Folders written at commit 7bc5c23, before the package was rearranged: they load, verify and resume.

They were made by `make_plan` and `prune(..., output_dir=...)` on `source`, a Llama of three blocks in bfloat16, with
`SparsityConfig(0.5, allocator="owl", pruner="wanda")` and the calibration rows of `ids.json`. `unfinished` was
interrupted after two blocks.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from hf_sparsity import Plan, SparseModel, SparsityConfig, make_plan, prune, unpack, verify
from hf_sparsity.model.fingerprint import versions
from tests.conftest import GOLDENS

FOLDERS = GOLDENS.parent / "folders"
CONFIG = SparsityConfig(0.5, allocator="owl", pruner="wanda")


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def calibration_rows():
    return torch.tensor(json.loads((FOLDERS / "ids.json").read_text()))


def run(output, plan=None):
    model = hf.AutoModelForCausalLM.from_pretrained("source")  # the record of a run has this name
    plan = plan or make_plan(model, CONFIG, calibration_rows(), output_dir=output)
    return prune(model, plan, calibration_rows(), output_dir=output)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_a_finished_folder_loads_and_verifies(layout):
    model = SparseModel.from_pretrained(FOLDERS / layout)
    expected = weights(FOLDERS / "plain")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert verify(FOLDERS / layout).ok
    assert Plan.load(FOLDERS / layout) == Plan.load(FOLDERS / "plain")


def test_a_packed_folder_unpacks_to_the_dense_one(tmp_path):
    unpack(FOLDERS / "packed", tmp_path / "dense")
    for file in sorted(FOLDERS.glob("plain/*.safetensors")):
        assert (tmp_path / "dense" / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    shutil.copytree(FOLDERS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if Plan.load("plain").versions != versions():  # other kernels may round otherwise, so these runs are not mixed
        with pytest.raises(ValueError, match="versions was"):
            run("unfinished")
        return
    run("unfinished")
    expected, resumed = weights(tmp_path / "plain"), weights(tmp_path / "unfinished")
    assert resumed.keys() == expected.keys()
    run("whole", Plan.load("plain"))  # tells whether this processor rounds as the one of the fixture did
    same = all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "whole").items())
    for name, tensor in resumed.items():
        if same or not name.startswith("model.layers.2."):
            assert torch.equal(tensor, expected[name]), name
        else:
            assert ((tensor == 0) == (expected[name] == 0)).float().mean() > 0.98, name
    assert Plan.load("unfinished") == Plan.load("plain")
    assert not list((tmp_path / "unfinished").glob("UNFINISHED"))
