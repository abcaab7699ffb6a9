"""What goes in comes out: every way of writing keeps the tensors and files that the model's Python class does not know."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from hf_sparsity import Output, Report, SparsityConfig, make_plan, open_streamed, prune, save_sparse, unpack, verify
from hf_sparsity.checkpoint.completion import check_writable
from hf_sparsity.checkpoint.source import find_source
from tests.conftest import tiny

CONFIG = SparsityConfig(0.5, pruner="magnitude")
CARRIED = {
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "modeling_own.py": "raise RuntimeError('never run')",
    "LICENSE": "mine",
    "vocab/words.txt": "a",
}
STAYING = {
    "README.md": "the card of the dense model",
    "sparsity_metrics.json": "{}",
    "optimizer.pt": "",
    "pytorch_model.bin": "",
    "original/consolidated.00.pth": "",
    "checkpoint-10/trainer_state.json": "{}",
    ".cache/x": "",
}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose checkpoint has a layer that predicts further tokens, which its class has no place for."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny("deepseek_v3")
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    last = model.config.num_hidden_layers
    further = {
        f"model.layers.{last}.eh_proj.weight": torch.randn(4, 8),
        f"model.layers.{last}.enorm.weight": torch.ones(3),
    }
    save_file(stored | further, folder / "model.safetensors", {"format": "pt"})
    fill(folder, CARRIED | STAYING)
    return folder, further


def check(folder, further):
    written = tensors(folder)
    assert all(torch.equal(written[name], tensor) for name, tensor in further.items())
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    for name, text in CARRIED.items():
        assert (folder / name).read_text() == text, name
    assert not [name for name in STAYING if (folder / name).exists()]
    _, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("stream", [False, True])
def test_pruning_into_a_folder(source, stream, tmp_path):
    folder, further = source
    model = open_streamed(folder) if stream else hf.AutoModelForCausalLM.from_pretrained(folder)
    report = prune(model, make_plan(model, CONFIG), output_dir=tmp_path / "out")
    check(tmp_path / "out", further)
    assert tensors(tmp_path / "out").keys() == tensors(folder).keys()
    (group,) = [name for name in report.skipped if name.endswith(f"layers.{model.config.num_hidden_layers}")]
    assert "2 tensors carried over" in report.skipped[group]
    assert Report.load(tmp_path / "out" / "sparsity_report.json").skipped == report.skipped


def test_weights_that_are_not_the_models_are_named_and_those_of_its_modules_kept(tmp_path):
    """A sentence-transformers folder has modules of its own; other files of weights hold dense copies."""
    tiny("llama").save_pretrained(tmp_path / "source")
    modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}]
    fill(tmp_path / "source", {"modules.json": json.dumps(modules), "2_Dense/config.json": "{}", "onnx/model.onnx": ""})
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "source/2_Dense/model.safetensors")
    for name in ("consolidated.safetensors", "fp16/model.safetensors"):
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        save_file({"a": torch.ones(2)}, tmp_path / "source" / name)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    report = prune(model, make_plan(model, CONFIG), output_dir=tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"], torch.ones(2, 2))
    named = {name for name, why in report.skipped.items() if "not carried over" in why}
    assert named == {"consolidated.safetensors", "fp16/", "onnx/"}
    assert not any((tmp_path / "out" / name).exists() for name in named)


def test_packing_and_unpacking(source, tmp_path):
    folder, further = source
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    prune(model, make_plan(model, CONFIG), output_dir=Output(tmp_path / "packed", layout="bitmask"))
    assert (tmp_path / "packed" / "LICENSE").exists()
    unpack(tmp_path / "packed", tmp_path / "out")
    check(tmp_path / "out", further)


@pytest.mark.parametrize("size", [None, "20KB"])
def test_saving_a_model_from_memory(source, size, tmp_path):
    folder, further = source
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    report = prune(model, make_plan(model, CONFIG))
    save_sparse(model, tmp_path / "out", report=report, max_shard_size=size)
    check(tmp_path / "out", further)


def test_another_model_is_not_taken_for_the_source(source, tmp_path):
    """A name in a config may be that of a folder that has changed, or of a model of other shapes."""
    folder, _ = source
    model = tiny("deepseek_v3")
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.name_or_path = str(folder)
    model.config.num_nextn_predict_layers = 1
    assert find_source(model) is None
    prune(model, make_plan(model, CONFIG), output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0, "the folder has none"
    other = tiny("llama")
    other.name_or_path = str(folder)
    assert find_source(other) is None and find_source(tiny("llama")) is None


def test_verify_compares_in_both_directions(source, tmp_path):
    folder, further = source
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    prune(model, make_plan(model, CONFIG), output_dir=tmp_path / "out")
    assert verify(tmp_path / "out", against=folder).ok
    file = next(f for f in (tmp_path / "out").glob("*.safetensors") if next(iter(further)) in load_file(f))
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file itself is replaced below
    name = next(iter(further))
    for change in ({name: None}, {name: whole[name] + 1}, {"new.weight": torch.ones(2)}):
        changed = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(changed, file, {"format": "pt"})
        failed = verify(tmp_path / "out", against=folder).failed
        assert [finding.where for finding in failed] == list(change), failed


def mxfp4(folder):
    """A tiny gpt-oss whose experts are stored as its published checkpoints have them."""
    config = hf.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    hf.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for key in [key for key in stored if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = stored.pop(key).shape
        stored[f"{key}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        stored[f"{key}_scales"] = torch.full((experts, outputs, inputs // 32), 121, dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("way", ["prune", "save_sparse"])
def test_experts_that_were_dequantized_on_loading(way, tmp_path):
    (tmp_path / "source").mkdir()
    mxfp4(tmp_path / "source")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    plan = make_plan(model, CONFIG)
    if way == "prune":
        prune(model, plan, output_dir=tmp_path / "out")
    else:
        save_sparse(model, tmp_path / "out", report=prune(model, plan))
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def fp8(folder):
    """A tiny Qwen3 as DeepSeek publishes: matrices in blocks of FP8 with a scale each, and a layer for further tokens."""
    config = hf.Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    hf.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.2.eh_proj.weight"] = torch.randn(64, 128, dtype=torch.bfloat16)
    for name in [name for name, tensor in stored.items() if "proj" in name]:
        blocks = [rows.split(32, dim=1) for rows in stored[name].float().split(32)]
        scales = torch.stack([torch.stack([block.abs().max() / 448 for block in row]) for row in blocks])
        whole = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)[
            : stored[name].shape[0], : stored[name].shape[1]
        ]
        stored[f"{name}_scale_inv"] = scales
        stored[name] = (stored[name].float() / whole).to(torch.float8_e4m3fn)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    described["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
    }
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("way", ["prune", "save_sparse", "packed"])
def test_blocks_of_fp8_that_were_dequantized_on_loading(way, tmp_path, caplog):
    (tmp_path / "source").mkdir()
    fp8(tmp_path / "source")
    quantized = hf.FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", dtype=torch.bfloat16, quantization_config=quantized
    )
    plan = make_plan(model, CONFIG)
    if way == "save_sparse":
        save_sparse(model, tmp_path / "out", report=prune(model, plan))
    else:
        report = prune(
            model, plan, output_dir=Output(tmp_path / "out", layout="bitmask" if way == "packed" else "dense")
        )
        assert "2 tensors left out, since they are quantized" in report.skipped["model.layers.2"]
    assert "model.layers.2: unknown to Qwen3ForCausalLM; its 2 tensors left out" in caplog.text
    described = json.loads((tmp_path / "out/config.json").read_text())
    assert described["num_nextn_predict_layers"] == 0
    assert described.get("quantization_config", {}).get("quant_method") == ("hf_sparsity" if way == "packed" else None)
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(ValueError, match="is quantized; its weights cannot be read block by block"):
        open_streamed(tmp_path / "source")


def test_what_would_not_load_again_is_refused_before_the_first_block(tmp_path):
    model = tiny("llama")
    check_writable(model)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size + 1, bias=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be written in a form that loads again"):
        prune(model, make_plan(model, CONFIG), output_dir=tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
