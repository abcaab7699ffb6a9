"""Damaged and incomplete checkpoints are told in a sentence, in memory and streamed; nothing foreign comes through."""

from __future__ import annotations

import json

import pytest
import torch

from hf_sparsity import Output, save_sparse
from hf_sparsity.checkpoint.plan_file import PlanFile
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.cli.main import main
from hf_sparsity.model.loading import load_model
from tests.conftest import tiny


def changed(**values):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def bad_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


DAMAGE = {
    "a file that was cut short": cut,
    "a config that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "an index without a map": bad_index,
    "a size that is no number": changed(hidden_size="big"),
    "another size": changed(intermediate_size=100),
    "more layers": changed(num_hidden_layers=9),
    "a class of nobody's": changed(architectures=["Nothing"], model_type="nothing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(damage, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "source")
    DAMAGE[damage](tmp_path / "source")
    for load in (load_model, open_streamed):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load(tmp_path / "source")
        assert len(str(caught.value)) < 800
    ask = [
        "prune",
        str(tmp_path / "source"),
        "--sparsity",
        "0.5",
        "--pruner",
        "magnitude",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(ask) == 2
    assert any(line.startswith("hf-sparsity: ") for line in capsys.readouterr().err.splitlines())
    assert not (tmp_path / "out").exists()


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for make in (Output, PlanFile, lambda path: save_sparse(tiny("llama"), path)):
        with pytest.raises(ValueError, match=r"cannot be made, since .*file' is a file"):
            make(tmp_path / "file" / "out")


def test_a_device_that_torch_does_not_know(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='gpu' is none that torch knows"):
        open_streamed(tmp_path, device="gpu")


def test_errors_of_the_machine_pass_as_they_are(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(tmp_path)
