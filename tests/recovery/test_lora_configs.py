"""Every adapter that peft has: sparse_lora says truly what it does to zeros, and the advice keeps them when followed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

peft = pytest.importorskip("peft")

from peft import LoraConfig, TrainableTokensConfig, get_peft_model  # noqa: E402

from hf_sparsity import load_sparse_lora, make_plan, merge_lora, prune, sparse_lora  # noqa: E402
from hf_sparsity.model.sparsity import check_zeros  # noqa: E402
from tests.conftest import tiny  # noqa: E402

IDS = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(3))
# What the defaults do not fit: a tiny model's widths, or arguments without default.
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 16},
    "MISS": {"r": 8},
    "SHIRA": {"r": 4},
    "ROAD": {"group_size": 16},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 64},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "LN_TUNING": {"target_modules": None},
}
# XLoRA is made of trained adapters on disk; BEFT needs layers with biases.
TYPES = {t.value: config for t, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value not in ("XLORA", "BEFT")}


def sparse():
    model = tiny("llama")
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    return model


def config_of(name):
    kind, values = TYPES[name], dict(OPTIONS.get(name, {}))
    known = {f.name for f in dataclasses.fields(kind)}
    if "target_modules" in known and name != "ADAPTION_PROMPT":
        values.setdefault("target_modules", ["q_proj", "down_proj"])
    if "num_virtual_tokens" in known:
        values.setdefault("num_virtual_tokens", 4)
    return kind(task_type="CAUSAL_LM", **values)


def trained(config):
    """A model with an adapter of stock peft, whose numbers look trained."""
    model = get_peft_model(sparse(), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("name", TYPES)
def test_the_advice_for_an_adapter_keeps_the_zeros(name):
    config = config_of(name)
    if name in ("LORA", "HIRA"):
        assert sparse_lora(sparse(), config).peft_config
        return
    with pytest.raises(ValueError, match=f"not {type(config).__name__}") as refused:
        sparse_lora(sparse(), copy.deepcopy(config))
    advice = str(refused.value)
    if "no zero is at risk" in advice:
        adapted = trained(config)
        before = dict(sparse().named_parameters())
        base = adapted.get_base_model()
        frozen = {n.replace("model.model.", "model.").replace(".base_layer", ""): p for n, p in base.named_parameters()}
        kept = [n for n in before if n in frozen and torch.equal(before[n], frozen[n])]
        assert len(kept) > 0.7 * len(before)
        with pytest.raises(ValueError, match=r"nothing to merge|cannot merge"):
            merge_lora(adapted)
    elif "keeps zeros by itself" in advice:
        check_zeros(trained(config).merge_and_unload())
    else:
        assert "may fill zeros" in advice and "merge_lora(model)" in advice
        merged = merge_lora(trained(config))
        check_zeros(merged)
        assert merged.config.sparsity_config["recovered"]["options"]["adapters"] == name


@pytest.mark.parametrize(("option", "value"), [("use_dora", True)])
def test_the_advice_for_a_variant_of_lora_keeps_the_zeros(option, value):
    config = LoraConfig(target_modules=["q_proj"], **{option: value})
    with pytest.raises(ValueError, match=r"merge it with hf_sparsity\.merge_lora"):
        sparse_lora(sparse(), copy.deepcopy(config))
    check_zeros(merge_lora(trained(config)))


def test_new_tokens_are_trained_beside_a_mask(tmp_path):
    config = LoraConfig(target_modules="all-linear", trainable_token_indices=[3, 4])
    model = sparse_lora(sparse(), copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "token_adapter" in name and parameter.requires_grad:
            parameter.data += 1
    ours = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_sparse_lora(sparse(), tmp_path)(input_ids=IDS).logits, ours)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, ours)
    check_zeros(merged)
    assert get_peft_model(
        sparse(), TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3])
    ).peft_config


def test_layers_that_were_trained_densely_are_masked_when_merged():
    model = trained(LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    dense = model.base_model.model.model.layers[0].mlp.down_proj.modules_to_save["default"].weight.detach().clone()
    merged = merge_lora(model)
    check_zeros(merged)
    weight = merged.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight[weight != 0], dense[weight != 0])


def test_an_adapter_that_changed_the_base_is_named():
    model = get_peft_model(sparse(), LoraConfig(init_lora_weights="pissa", target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*changed the base weights.*Load the sparse"):
        merge_lora(model)


def test_a_merge_is_recorded_as_long_as_it_lasts():
    model = sparse()
    adapted = sparse_lora(model, LoraConfig(target_modules=["q_proj"]))
    assert "recovered" not in model.config.sparsity_config
    adapted.merge_adapter()
    record = model.config.sparsity_config["recovered"]
    assert (
        record["method"] == "adapter" and record["options"] == {"adapters": "SPARSE_LORA"} and record["steps"] is None
    )
    adapted.unmerge_adapter()
    assert "recovered" not in model.config.sparsity_config
    sparse_lora(adapted, LoraConfig(target_modules=["k_proj"]), adapter_name="second")
    adapted.merge_adapter(["default", "second"])
    assert model.config.sparsity_config["recovered"]["previous"] is None
    adapted.unmerge_adapter()
    again = copy.deepcopy(adapted).merge_and_unload()
    assert again.config.sparsity_config["recovered"] and "recovered" not in model.config.sparsity_config
