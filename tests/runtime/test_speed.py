"""The record of a measurement: what it holds, and that a damaged one is refused. Nothing here looks at how fast anything is."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from hf_sparsity import make_plan, prune, save_sparse
from hf_sparsity.cli.main import main
from hf_sparsity.publish.card.make_card import make_card
from hf_sparsity.runtime.speed import SPEED_FILE, bytes_read, measure_speed, read_speed, write_speed


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    model = hf.LlamaForCausalLM(config).eval()
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    return model


def test_command_and_card(model, tmp_path, capsys):
    folder = tmp_path / "sparse"
    save_sparse(model, folder, layout="bitmask")
    make_card(folder)
    arguments = ["bench", str(folder), "--prompt", "3", "--tokens", "2", "--repeats", "1", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_speed(folder)
    assert set(printed["models"]) == {"packed", "dense bf16", "dense float32"}
    assert printed["models"]["packed"]["bytes"] < printed["models"]["dense float32"]["bytes"]
    assert set(printed["ratios"]["decode"]) == {"1", "2", "4"}
    assert "hf-sparsity bench" in (folder / "README.md").read_text()
    (folder / SPEED_FILE).write_text('{"version": 1, "ratios": {"bytes": "fast"}}')
    with pytest.raises(ValueError, match="measure again"):
        make_card(folder)


def test_what_is_read(model):
    whole = sum(p.numel() for p in model.parameters()) * 4
    assert bytes_read(model) == whole + sum(b.nbytes for b in model.buffers()) - 40 * 64 * 4


def test_refused(model, tmp_path, capsys):
    for folder, says in (("nowhere", "nowhere is not a folder"), (str(tmp_path), "has no config.json")):
        assert main(["bench", folder]) == 2 and says in capsys.readouterr().err
    with pytest.raises(ValueError, match="'packed'"):
        measure_speed({"dense": model})
    with pytest.raises(ValueError, match="at least 1"):
        measure_speed({"packed": model}, tokens=0)
    assert main(["bench", str(tmp_path), "--threads", "0"]) == 2
    assert read_speed(tmp_path) is None
    with pytest.raises(TypeError):
        write_speed(tmp_path, {"version": object()})
