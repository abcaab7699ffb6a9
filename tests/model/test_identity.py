"""What a changed model's config says that it is: another name, no packed files, a plan under the names of its class."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, LlamaModel

from hf_sparsity import SparseModel, make_plan, measure_sparsity, open_streamed, pack, prune, save_sparse, unpack
from hf_sparsity.model.identity import renew_identity
from hf_sparsity.model.sparsity import check_zeros, fit_names, model_plan
from tests.conftest import tiny

PRUNE = {"sparsity": 0.6, "pruner": "magnitude"}


def test_a_pruned_model_no_longer_bears_the_dense_ones_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    prune(model, make_plan(model, PRUNE))
    assert model.config._name_or_path == ""
    assert model.name_or_path == str(tmp_path / "dense"), "its tokenizer is looked for there"
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    save_sparse(model, tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    assert measure_sparsity(again).sparsity == pytest.approx(0.6, abs=0.01)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    prune(model, make_plan(model, PRUNE), output_dir=tmp_path / "out")
    check_zeros(AutoModelForCausalLM.from_pretrained(model.config._name_or_path))


def test_a_config_taken_from_a_packed_folder_can_be_pruned_into_a_folder(tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    prune(model, make_plan(model, PRUNE), output_dir=tmp_path / "sparse")
    pack(tmp_path / "sparse", tmp_path / "packed")
    new = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "packed"))
    assert new.config.quantization_config
    prune(new, make_plan(new, PRUNE), output_dir=tmp_path / "new")
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "new"))
    other = tiny("llama")
    other.config.quantization_config = {"quant_method": "other"}
    renew_identity(other, None)
    assert other.config.quantization_config == {"quant_method": "other"}


def test_a_new_model_with_the_config_of_a_packed_one(tmp_path):
    """It is neither packed nor pruned: what claims so is dropped or refused, and transformers' own files of it load."""
    model = tiny("llama").to(torch.bfloat16)
    prune(model, make_plan(model, PRUNE))
    save_sparse(model, tmp_path / "packed", layout="bitmask")
    new = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "packed"))
    new.save_pretrained(tmp_path / "new")
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "new"), open_streamed(tmp_path / "new")):
        assert not hasattr(again.config, "quantization_config") and not hasattr(again.config, "transformers_weights")
        assert torch.equal(again.lm_head.weight, new.lm_head.weight)
    assert measure_sparsity(again).sparsity < 0.01
    with pytest.raises(ValueError, match="do not have the zeros that their plan promises"):
        SparseModel.from_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="the config was taken from another model"):
        save_sparse(new, tmp_path / "saved")
    del new.config.sparsity_config
    save_sparse(new, tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert not hasattr(config, "quantization_config") and not hasattr(config, "sparsity_config")


def test_packed_files_are_not_quantized_while_loading(tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    prune(model, make_plan(model, PRUNE), output_dir=tmp_path / "sparse")
    pack(tmp_path / "sparse", tmp_path / "packed")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    with pytest.raises(ValueError, match=r"is packed.*hf_sparsity\.unpack\("):
        SparseModel.from_pretrained(tmp_path / "packed", **options)
    unpack(tmp_path / "packed", tmp_path / "again")
    try:
        SparseModel.from_pretrained(tmp_path / "again", **options)
    except ValueError as error:  # bitsandbytes is no dependency
        assert "bitsandbytes" in str(error)


@pytest.mark.parametrize("ignore", [(), ("model.layers.0", "o_proj", "lm_head")])
def test_a_plan_fits_a_model_without_its_head_and_back(ignore, tmp_path):
    model = tiny("llama")
    plan = make_plan(model, PRUNE | {"ignore": ignore})
    prune(model, plan)
    model.save_pretrained(tmp_path)
    body = LlamaModel.from_pretrained(tmp_path)
    check_zeros(body)
    fitted = model_plan(body)
    assert {f"model.{name}" for name in fitted.layers} == set(plan.layers)
    assert measure_sparsity(body).sparsity == measure_sparsity(model).sparsity
    assert fit_names(fitted, model).layers == plan.layers
    other = make_plan(tiny("gpt2"), PRUNE)
    assert fit_names(other, model) is other
