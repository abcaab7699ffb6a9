"""Masked LoRA: the update that is trained is the one that is merged, and zeros stay zeros; for every option."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")

from peft import HiraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from hf_sparsity import make_plan, prune  # noqa: E402
from hf_sparsity.model.sparsity import check_zeros  # noqa: E402
from hf_sparsity.recovery.lora import load_sparse_lora, merge_lora, planned_parameters, sparse_lora  # noqa: E402
from hf_sparsity.recovery.lora_layers import Masked, MaskedProduct, MaskedSum  # noqa: E402
from tests.conftest import tiny  # noqa: E402

IDS = torch.randint(3, 120, (24, 16), generator=torch.Generator().manual_seed(3))
DATA = [{"input_ids": row, "labels": row} for row in IDS]
PRUNE = {"sparsity": 0.6, "pruner": "magnitude"}
EXPERTS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TARGETS = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_fc"]},
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,  # experts stored [experts, in, out]
}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"q_proj": 32, "c_attn": 32}},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bias": {"lora_bias": True},
}


def sparse(name="llama", dtype=torch.float32, **config):
    model = tiny(name, dtype)
    for module in model.modules() if dtype is torch.bfloat16 else ():
        if hasattr(module, "top_k"):
            module.top_k = 4  # all experts: otherwise a rounding flips the choice of one, and outputs jump
    prune(model, make_plan(model, PRUNE | config))
    return model


def fill(model, adapter="default", seed=0):
    """Trained-looking factors: B is 0 at the start, and everything would be equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def zeros(model):
    return {name: parameter.detach() == 0 for name, parameter in planned_parameters(model).items()}


def assert_zeros_kept(model, dead):
    values = dict(model.named_parameters())
    for name, gone in dead.items():
        assert not values[name].detach()[gone].any(), name
    check_zeros(model)


def assert_close(one, other, dtype):
    """Within a few roundings of the dtype, relative to the largest output."""
    limit = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    assert ((one - other).abs().max() / other.abs().max()).item() < limit


# ---- the formula


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_the_product(transposed):
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    weight = torch.randn(*((5, 4) if transposed else (4, 5)), dtype=torch.float64)
    weight[torch.rand_like(weight) < 0.5] = 0
    x, a, b = make(2, 3, 5), make(2, 5), make(4, 2)
    delta = 0.7 * (b @ a) * ((weight.T if transposed else weight) != 0)
    torch.testing.assert_close(MaskedProduct.apply(x, a, b, weight, 0.7, transposed), x @ delta.T)
    assert torch.autograd.gradcheck(lambda *t: MaskedProduct.apply(*t, weight, 0.7, transposed), (x, a, b))


def test_gradients_of_the_sum():
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    base = torch.randn(3, 4, 5, dtype=torch.float64)
    base[torch.rand_like(base) < 0.5] = 0
    left, right, weight = make(3, 4, 2), make(3, 2, 5), base.clone().requires_grad_()
    expected = weight + 0.7 * (left @ right) * (base != 0)
    torch.testing.assert_close(MaskedSum.apply(weight, base, left, right, 0.7), expected)
    assert torch.autograd.gradcheck(lambda w, x, y: MaskedSum.apply(w, base, x, y, 0.7), (weight, left, right))


@pytest.mark.parametrize("name", TARGETS)
def test_the_function_is_the_formula(name):
    """W + M∘(s·BA), put into a copy of the base by hand, gives the same outputs and gradients of the same loss."""
    model = sparse(name)
    reference = copy.deepcopy(model)
    adapted = fill(sparse_lora(model, LoraConfig(r=4, lora_alpha=6, **TARGETS[name])))
    values = dict(reference.named_parameters())
    with torch.no_grad():
        for path, layer in adapted.get_base_model().named_modules():
            if not isinstance(layer, Masked):
                continue
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            parameter = f"{path}.{getattr(layer, 'parameter_name', 'weight')}".replace(".base_layer", "")
            base = values[parameter]
            if base.ndim == 3:
                experts = base.shape[0]
                a, b = a.reshape(experts, 4, -1), b.reshape(-1, 4, experts)
                delta = torch.einsum("ore,eri->eoi", b, a)
                delta = delta.mT if delta.shape != base.shape or name == "gpt_oss" else delta
            else:
                delta = (b @ a).T if name == "gpt2" else b @ a
            base += 1.5 * delta * (base != 0)
    assert_close(logits(adapted), logits(reference), torch.float32)


def test_the_update_is_not_kept_for_the_backward_pass():
    model = fill(sparse_lora(sparse(), LoraConfig(r=4, target_modules="all-linear")))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in planned_parameters(model.get_base_model()).values()}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters and tensor.shape in shapes:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS[:2, :5], labels=IDS[:2, :5]).loss.backward()
    assert kept == []


# ---- merging


@pytest.mark.parametrize(
    ("name", "option", "dtype"),
    [
        (n, o, d)
        for n, o, d in itertools.product(TARGETS, OPTIONS, (torch.float32, torch.bfloat16))
        if not (n in ("mixtral", "gpt_oss") and o in ("dropout", "bias"))  # peft: not on parameters
        and not (n == "llama" and o == "bias")  # its layers have no bias
        and (d is torch.float32 or o in ("plain", "rslora"))
    ],
)
def test_merged_is_unmerged_with_every_zero(name, option, dtype):
    model = sparse(name, dtype)
    dead = zeros(model)
    dense = logits(model)
    adapted = fill(sparse_lora(model, LoraConfig(r=4, **TARGETS[name] | OPTIONS[option])))
    before = logits(adapted)
    assert (before - dense).abs().max() > 0.05 * dense.abs().max(), "the adapter does nothing"
    merged = adapted.merge_and_unload()
    assert not any(isinstance(m, Masked) for m in merged.modules())
    assert all(p.dtype == dtype for p in merged.parameters())
    assert_close(logits(merged), before, dtype)
    assert_zeros_kept(merged, dead)


@pytest.mark.parametrize("name", TARGETS)
def test_several_adapters(name):
    model = sparse(name)
    dead = zeros(model)
    adapted = fill(sparse_lora(model, LoraConfig(r=4, **TARGETS[name])))
    first = logits(adapted)
    fill(sparse_lora(adapted, LoraConfig(r=2, **TARGETS[name]), adapter_name="second"), "second", seed=1)
    assert_close(logits(adapted), first, torch.float32)
    adapted.set_adapter("second")
    second = logits(adapted)
    assert (first - second).abs().max() > 0.05
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    adapted.merge_adapter()
    assert_close(logits(adapted), both, torch.float32)
    adapted.unmerge_adapter()
    assert_close(logits(adapted), both, torch.float32)
    with adapted.disable_adapter():
        assert_close(logits(adapted), logits(sparse(name)), torch.float32)
    merged = adapted.merge_and_unload(adapter_names=["default", "second"])
    assert_close(logits(merged), both, torch.float32)
    assert_zeros_kept(merged, dead)


def test_two_adapters_are_cast_once():
    """bfloat16: each of two updates is lost in rounding, their sum is not."""
    model = sparse(dtype=torch.bfloat16)
    adapted = sparse_lora(model, LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]))
    sparse_lora(adapted, LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]), adapter_name="b")
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.data
    weight[:] = torch.where(weight == 0, 0, 1.0)
    for adapter in ("default", "b"):
        for factor in (layer.lora_A, layer.lora_B):
            factor[adapter].weight.data.fill_(0.0025**0.5)  # bfloat16 near 1 has steps of 2**-7; half of one is 0.0039
    adapted.base_model.set_adapter(["default", "b"])
    merged = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    assert set(merged.unique().tolist()) == {0.0, 1.0078125}


def test_a_survivor_cancelled_by_a_merge_comes_back():
    model = sparse()
    adapted = sparse_lora(model, LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight.data
    row, column = (weight != 0).nonzero()[0].tolist()
    layer.lora_A["default"].weight.data.zero_()[0, column] = 1
    layer.lora_B["default"].weight.data.zero_()[row, 0] = -weight[row, column]
    before = weight.clone()
    adapted.merge_adapter()
    assert layer.base_layer.weight[row, column] == 0
    adapted.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_broken_adapter_is_not_merged():
    adapted = fill(sparse_lora(sparse(), LoraConfig(target_modules=["q_proj"])))
    adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapted.merge_and_unload()


# ---- stock adapters


@pytest.mark.parametrize("name", TARGETS)
def test_a_plain_lora_is_masked_when_merged(name):
    model = sparse(name)
    dead = zeros(model)
    config = TARGETS[name]
    adapted = fill(get_peft_model(model, LoraConfig(r=4, fan_in_fan_out=name == "gpt2", **config)))
    ours = fill(sparse_lora(sparse(name), LoraConfig(r=4, **config)))
    merged = merge_lora(adapted)
    assert_zeros_kept(merged, dead)
    assert_close(logits(merged), logits(ours), torch.float32)  # masking the update before or after is the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_is_masked_when_merged(dtype):
    model = sparse(dtype=dtype)
    dead = zeros(model)
    merged = merge_lora(fill(get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj", "up_proj"]))))
    assert_zeros_kept(merged, dead)
    assert all(p.dtype == dtype for p in merged.parameters())


def test_merge_lora_also_takes_ours_and_modules_to_save():
    model = sparse()
    dead = zeros(model)
    adapted = fill(sparse_lora(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    head = adapted.base_model.model.lm_head.modules_to_save["default"].weight
    head.data += 1
    before = logits(adapted)
    merged = merge_lora(adapted)
    assert_close(logits(merged), before, torch.float32)
    assert_zeros_kept(merged, dead)


def test_a_plain_merge_is_caught_and_explained():
    model = fill(get_peft_model(sparse(), LoraConfig(target_modules=["q_proj"]))).merge_and_unload()
    with pytest.raises(ValueError, match="merged with an adapter"):
        check_zeros(model)
    adapted = fill(get_peft_model(sparse(), LoraConfig(target_modules=["q_proj"])))
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        merge_lora(adapted)


def test_hira_keeps_zeros_by_itself():
    model = sparse()
    dead = zeros(model)
    adapted = sparse_lora(model, HiraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "hira_" in name:
            parameter.data.normal_(0, 0.3)
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert_close(logits(merged), before, torch.float32)
    assert_zeros_kept(merged, dead)


# ---- saving and loading


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_is_saved_and_loaded_alone(name, tmp_path):
    adapted = fill(sparse_lora(sparse(name), LoraConfig(r=4, use_rslora=True, **TARGETS[name])))
    before = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    loaded = load_sparse_lora(sparse(name), tmp_path)
    assert torch.equal(logits(loaded), before)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in load_sparse_lora(sparse(name), tmp_path, is_trainable=True).parameters())
    both = fill(sparse_lora(sparse(name), LoraConfig(r=2, **TARGETS[name])))
    load_sparse_lora(both, tmp_path, adapter_name="loaded")
    both.set_adapter("loaded")
    assert_close(logits(both), before, torch.float32)


def test_stock_loading_is_refused_not_wrong(tmp_path):
    fill(sparse_lora(sparse(), LoraConfig(target_modules=["q_proj"]))).save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError), match="load_sparse_lora"):
        PeftModel.from_pretrained(sparse(), str(tmp_path))
    with pytest.raises((KeyError, ValueError), match="load_sparse_lora"):
        sparse().load_adapter(str(tmp_path))


def test_loading_on_another_base_is_refused(tmp_path):
    fill(sparse_lora(sparse(), LoraConfig(target_modules=["q_proj"]))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="zeros elsewhere"):
        load_sparse_lora(sparse(sparsity=0.5), tmp_path)
    moved = sparse()
    with torch.no_grad():
        weight = moved.model.layers[1].mlp.up_proj.weight
        weight.copy_(weight.flip(0))
    with pytest.raises(ValueError, match="zeros elsewhere"):
        load_sparse_lora(moved, tmp_path)


def test_damaged_adapters_are_refused(tmp_path):
    adapted = fill(sparse_lora(sparse(), LoraConfig(target_modules=["q_proj"])))
    adapted.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(config | {"sparse_base": config["sparse_base"] | {"version": 2}})
    )
    with pytest.raises(ValueError, match="version 2"):
        load_sparse_lora(sparse(), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        load_sparse_lora(sparse(), tmp_path / "a")
    get_peft_model(sparse(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="no masked adapter"):
        load_sparse_lora(sparse(), tmp_path / "b")


# ---- training


class Watch(TrainerCallback):
    """At every step: the base is as it was, and the effective weights are 0 wherever it is."""

    def __init__(self, model):
        self.before = {n: p.detach().clone() for n, p in planned_parameters(model.get_base_model()).items()}
        self.steps = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        for name, parameter in planned_parameters(model.get_base_model()).items():
            assert torch.equal(parameter, self.before[name]), name
        for layer in model.modules():
            if isinstance(layer, Masked):
                base = layer.base_parameter().detach()
                effective = base + layer.get_delta_weight("default")
                assert not effective[base == 0].any()
                assert state.global_step == 0 or (effective != base)[base != 0].float().mean() > 0.9 or base.ndim == 3


WAYS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "best": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
}


def trainer(model, folder, *callbacks, steps=4, **changes):
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(arguments | changes))
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=list(callbacks))


@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    [
        *(("llama", way, torch.float32) for way in WAYS if way != "compile"),
        pytest.param("llama", "compile", torch.float32, marks=pytest.mark.slow),
        ("llama", "bf16", torch.bfloat16),
        *((n, w, torch.float32) for n in ("gpt2", "mixtral") for w in ("plain", "checkpointing")),
        ("mixtral", "plain", torch.bfloat16),
    ],
)
def test_training_keeps_zeros_at_every_step(name, way, dtype, tmp_path):
    model = sparse(name, dtype)
    dead = zeros(model)
    adapted = sparse_lora(model, LoraConfig(r=4, **TARGETS[name]))
    watch = Watch(adapted)
    start = logits(adapted)
    run = trainer(adapted, tmp_path, watch, **WAYS[way])
    run.train()
    assert watch.steps == 4
    before = logits(adapted)
    assert (before - start).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    assert_close(logits(merged), before, torch.bfloat16 if way == "bf16" else dtype)
    assert_zeros_kept(merged, dead)


def test_training_resumes(tmp_path):
    def start():
        torch.manual_seed(7)
        return sparse_lora(sparse(), LoraConfig(r=4, target_modules="all-linear"))

    whole = start()
    trainer(whole, tmp_path).train()
    again = start()
    trainer(again, tmp_path, Watch(again)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(logits(again), logits(whole), torch.float32)
    loaded = load_sparse_lora(sparse(), tmp_path / "checkpoint-4")
    assert_close(logits(loaded), logits(whole), torch.float32)


SCRIPT = """
import sys, torch
from tests.recovery.test_lora import *
torch.set_num_threads(1)
torch.manual_seed(7)
model = sparse_lora(sparse(), LoraConfig(r=4, target_modules="all-linear"))
run = trainer(model, sys.argv[1], Watch(model), gradient_accumulation_steps=2)
run.train()
assert run.args.world_size == 2
check_zeros(model.merge_and_unload())
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"layer_replication": [(0, 2)]}, "replicated"),
        ({"target_modules": ["q_proj", "lm_head"]}, "such as lm_head"),
        ({"target_modules": ["embed_tokens"]}, "not in the sparsity plan"),
        ({"modules_to_save": ["up_proj"]}, "trains a pruned layer densely"),
    ],
)
def test_refused_options(config, message):
    model = sparse()
    before = dict(model.named_modules()).keys()
    with pytest.raises(ValueError, match=message):
        sparse_lora(model, LoraConfig(**{"target_modules": ["q_proj"]} | config))
    assert dict(model.named_modules()).keys() == before, "the model is left with adapters"


def test_layers_the_plan_left_dense():
    config = {"ignore": ("o_proj", "model.layers.0")}
    with pytest.raises(ValueError, match="not in the sparsity plan"):
        sparse_lora(sparse(**config), LoraConfig(target_modules=["q_proj", "o_proj"]))
    adapted = sparse_lora(model := sparse(**config), LoraConfig(target_modules="all-linear"))
    names = [n for n, m in model.named_modules() if isinstance(m, Masked)]
    assert len(names) == 2 * 6 and not any("o_proj" in n or "layers.0" in n for n in names)
    with pytest.raises(ValueError, match="not in the sparsity plan"):
        sparse_lora(adapted, LoraConfig(target_modules=["o_proj"]), adapter_name="second")
    assert set(adapted.peft_config) == {"default"}
    with pytest.raises(ValueError, match="not in the sparsity plan"):
        sparse_lora(sparse(**config), HiraConfig(target_modules=["o_proj"]))


def test_refused_models(tmp_path):
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="no zeros to keep"):
        sparse_lora(tiny("llama"), config)
    with pytest.raises(ValueError, match="no zeros to keep"):
        merge_lora(get_peft_model(tiny("llama"), config))
    with pytest.raises(ValueError, match="PeftModel is expected"):
        merge_lora(sparse())
    with pytest.raises(ValueError, match="LoraConfig or HiraConfig"):
        sparse_lora(sparse(), IA3Config())
    model = sparse()
    model.config.sparsity_config = sparse("gpt2").config.sparsity_config
    with pytest.raises(ValueError, match="another model"):
        sparse_lora(model, config)
    model = sparse()
    weight = model.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight[:10].clone())
    with pytest.raises(ValueError, match=r"has 6144 weights in model.layers.0.mlp.up_proj.weight, the model 640"):
        sparse_lora(model, config)
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantized"):
        sparse_lora(model, config)


def test_a_plain_adapter_beside_a_masked_one_is_refused():
    adapted = sparse_lora(sparse(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="would fill its zeros"):
        adapted.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="already"):
        sparse_lora(adapted, LoraConfig(target_modules=["q_proj"]))


def test_a_model_without_a_plan():
    model = sparse()
    del model.config.sparsity_config
    dead = zeros(model)
    before = logits(adapted := fill(sparse_lora(model, LoraConfig(target_modules="all-linear"))))
    merged = adapted.merge_and_unload()
    assert_close(logits(merged), before, torch.float32)
    assert all(torch.equal(p == 0, dead[n]) for n, p in merged.named_parameters() if n in dead)
    gc.collect()


@pytest.mark.slow
def test_the_example(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples" / "recover_with_lora.py"), "--steps", "5", "--heldout", "4"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
