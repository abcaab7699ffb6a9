"""SparseModel.from_pretrained: the hook, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from hf_sparsity import Plan, SparseModel, SparsityConfig, make_plan, measure_sparsity
from hf_sparsity import demo as demo_model
from tests.conftest import tiny, tiny_batch

IDS = tiny_batch("llama", sequences=4, tokens=32)["input_ids"]


@pytest.fixture
def folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_it_returns_the_plain_model_pruned(folder, tmp_path):
    config = SparsityConfig(0.5, allocator="owl")
    model = SparseModel.from_pretrained(
        folder, sparsity_config=config, calibration_data=IDS, device_map="cpu", dtype=torch.bfloat16
    )
    assert type(model) is hf.LlamaForCausalLM and model.dtype == torch.bfloat16
    assert measure_sparsity(model).sparsity == pytest.approx(0.5, abs=0.01)
    model.save_pretrained(tmp_path / "out")
    again = SparseModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert Plan.load(tmp_path / "out").config["allocator"]["name"] == "owl"


def test_a_plan_made_earlier_or_edited(folder, tmp_path):
    plan = make_plan(tiny("llama"), SparsityConfig(0.5), IDS)
    data = plan.to_dict()
    first, second = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"
    data["layers"][first]["sparsity"], data["layers"][second]["sparsity"] = 0.25, 0.75
    (tmp_path / "plan.json").write_text(json.dumps(data))
    for given in (Plan.from_dict(data), tmp_path / "plan.json"):
        model = SparseModel.from_pretrained(folder, plan=given, calibration_data=IDS)
        assert float((model.get_submodule(first).weight == 0).float().mean()) == 0.25
        assert float((model.get_submodule(second).weight == 0).float().mean()) == 0.75


def test_texts_are_tokenized_with_the_checkpoints_tokenizer():
    texts = [text for _, text in demo_model.texts("calibration")[:6]]
    options = {"sequences": 2, "length": 64}
    config = {"sparsity": 0.5, "pruner": "wanda"}
    model = SparseModel.from_pretrained(
        demo_model.PATH, sparsity_config=config, calibration_data=texts, calibration_options=options
    )
    data = model.config.sparsity_config["pruned"]["data"]
    assert (data["sequences"], data["tokens"]) == (2, 128)
    dicts = [{"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4)}]
    model = SparseModel.from_pretrained(demo_model.PATH, sparsity_config=config, calibration_data=dicts)
    assert model.config.sparsity_config["pruned"]["data"]["tokens"] == 4


def test_other_heads(tmp_path):
    tiny("t5").save_pretrained(tmp_path)
    batch = [tiny_batch("t5")]
    model = SparseModel.from_pretrained(
        tmp_path, sparsity_config=SparsityConfig(0.5), calibration_data=batch, auto_class=hf.AutoModelForSeq2SeqLM
    )
    assert type(model) is hf.T5ForConditionalGeneration and measure_sparsity(model).sparsity == 0.5


def test_what_is_refused(folder, tmp_path):
    config = SparsityConfig(0.5)
    plan = make_plan(tiny("llama"), config, IDS)
    with pytest.raises(ValueError, match="not both"):
        SparseModel.from_pretrained(folder, sparsity_config=config, plan=plan)
    with pytest.raises(ValueError, match="calibration data"):
        SparseModel.from_pretrained(folder, sparsity_config=config)
    with pytest.raises(ValueError, match="no sparsity plan"):
        SparseModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="say how sparse"):
        SparseModel.from_pretrained(folder, calibration_data=IDS)
    with pytest.raises(ValueError, match="did you mean 'wanda'"):
        SparseModel.from_pretrained(folder, sparsity_config={"sparsity": 0.5, "pruner": "wandas"}, calibration_data=IDS)
    with pytest.raises(ValueError, match="SparsityConfig or its dict"):
        SparseModel.from_pretrained(folder, sparsity_config=0.5, calibration_data=IDS)
    with pytest.raises(TypeError, match="factory"):
        SparseModel()


def test_lost_zeros_are_an_error_that_names_the_layer(folder, tmp_path):
    out = tmp_path / "out"
    SparseModel.from_pretrained(folder, sparsity_config=SparsityConfig(0.5), calibration_data=IDS).save_pretrained(out)
    SparseModel.from_pretrained(out)
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has 0\.0"):
        SparseModel.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["sparsity_config"]["layers"]["model.layers.0.mlp.up_proj"]["sparsity"] = 7
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\)"):
        SparseModel.from_pretrained(out)


def test_a_sparse_model_trains_generates_and_keeps_its_plan(folder):
    model = SparseModel.from_pretrained(folder, sparsity_config=SparsityConfig(0.5), calibration_data=IDS)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    model.eval()
    assert model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
