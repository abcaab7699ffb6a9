"""`verify`: folders that hold what they say, in every form, and what each later step does to them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_sparsity import make_plan, prune, recover, save_sparse
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.evaluation.metrics import Interval, Metrics, TaskRecord, TextRecord
from hf_sparsity.model.fingerprint import weights_fingerprint
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.sparsity import mask_hash, measure_sparsity
from hf_sparsity.plan import LayerReport
from hf_sparsity.publish.verify.layer_facts import is_on_grid
from hf_sparsity.publish.verify.verify import verify
from tests.conftest import ZOO, _text, tiny
from tests.tools import row_and_column

SMALL = "60KB"  # a tiny model in several shards
TIED = hf.LlamaConfig(**_text(tie_word_embeddings=True))


def make(folder, name="llama", *, layout="dense", dtype=torch.float32, data=None, **config):
    """(dense folder, sparse folder with a report, model in memory)."""
    model = tiny(name, dtype) if name in ZOO else hf.AutoModelForCausalLM.from_config(TIED, dtype=dtype).eval()
    model.save_pretrained(folder / "d", max_shard_size=SMALL)
    report = prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"} | config, data), data)
    save_sparse(model, folder / "s", report=report, layout=layout, max_shard_size=SMALL)
    return folder / "d", folder / "s", model


def told(result, *, status="failed"):
    """{check: number of findings}."""
    found = [finding.check for finding in result.findings if finding.status == status]
    return {check: found.count(check) for check in found}


def reasons(result):
    """All explanations, joined."""
    return " | ".join(finding.message for finding in result.findings if finding.check == "explanation")


def edit(path, change):
    """Rewrites a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder, change):
    """Loads a folder, changes its prunable weights by name, and saves it in place, as a later step would."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in find_layers(model).weights.items():
            change(name, weight.read())
    model.save_pretrained(folder, max_shard_size=SMALL)


# ---- folders that hold what they say


@pytest.mark.parametrize(
    ("layout", "name"),
    row_and_column(["bitmask", "dense"], ["mixtral", "llama", "tied", "gpt2", "qwen3_moe", "gpt_oss", "t5", "whisper"]),
)
def test_what_was_just_made_is_right(name, layout, tmp_path):
    dense, sparse, model = make(tmp_path, name, layout=layout)
    result = verify(sparse, against=dense)
    assert result.ok and told(result, status="note") == {}, result.findings
    passed = told(result, status="ok")
    assert {"files", "plan", "fingerprints", "report", "zeros", "masks", "finite", "survivors"} <= set(passed)
    assert ("tied" in passed) == (name in ("tied", "gpt2", "t5", "whisper"))
    counted = measure_sparsity(model)
    assert {n: x.zeros for n, x in result.measured.layers.items()} == {n: x.zeros for n, x in counted.layers.items()}
    assert result.weights == weights_fingerprint(model)
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_groups(name, layout, tmp_path):
    """Groups lie along the inputs of a layer, whatever the order in which it is stored."""
    dense, sparse, model = make(tmp_path, name, layout=layout, sparsity=None, pattern="2:4")
    result = verify(sparse, dense)
    assert result.ok
    groups = sum(weight.size for weight in find_layers(model).weights.values()) // 4
    assert [f.message.split()[1] for f in result.findings if f.check == "pattern"] == [str(groups)]


def test_groups_that_keep_too_many(tmp_path):
    _, sparse, _ = make(tmp_path, sparsity=0.5, pattern="*:4")

    def swap(name, weight):
        if name.endswith("layers.1.mlp.up_proj"):
            weight[3].copy_(weight[3].sort().values)  # as many zeros, side by side

    edit_weights(sparse, swap)
    result = verify(sparse)
    assert told(result) == {"pattern": 1, "masks": 1}
    assert "groups keep more than 2:4 allows" in next(f.message for f in result.failed)
    assert "in other places" in reasons(result)


def test_packed_folders_are_streamed(tmp_path):
    _, sparse, model = make(tmp_path, "mixtral", layout="bitmask")
    streamed = open_streamed(sparse)
    assert any(parameter.is_meta for parameter in streamed.parameters())
    assert not hasattr(streamed.config, "quantization_config")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, model(ids).logits)


def test_without_a_report_the_plan_is_enough(tmp_path):
    _, sparse, _ = make(tmp_path)
    (sparse / REPORT_FILE).unlink()
    result = verify(sparse)
    assert result.ok and told(result, status="not applicable").keys() >= {"report", "masks"}
    edit_weights(sparse, lambda name, weight: weight.fill_(1) if "q_proj" in name else None)
    assert told(verify(sparse)) == {"zeros": 3}


def test_reports_from_before_there_were_hashes(tmp_path):
    _, sparse, _ = make(tmp_path)
    edit(sparse / REPORT_FILE, lambda report: [layer.pop("mask") for layer in report["layers"].values()])
    result = verify(sparse)
    assert result.ok and "masks" in told(result, status="not applicable")


def test_the_hash_of_a_mask():
    """Against bytes by hand: 0b10110000 and 0b01000000, ten weights row by row."""
    import hashlib

    weight = torch.tensor([[1.0, 0, -2, 3, 0], [0, 0, -0.0, 0, 9]])
    assert mask_hash(weight) == hashlib.blake2b(bytes([0b10110000, 0b01000000]), digest_size=16).hexdigest()
    assert mask_hash(weight.T.contiguous().T) == mask_hash(weight) != mask_hash(weight.T)
    assert mask_hash(weight.bfloat16()) == mask_hash(weight)
    with pytest.raises(ValueError, match="32 hex digits"):
        LayerReport(1, 2, 0.5, mask="x" * 32)


# ---- against the dense model


def test_survivors_are_compared_in_the_dtype_of_the_sparse_model(tmp_path):
    dense, sparse, model = make(tmp_path)
    shutil.rmtree(sparse)
    save_sparse(model.bfloat16(), sparse)
    result = verify(sparse, dense)
    assert result.ok
    message = next(f.message for f in result.findings if f.check == "survivors")
    assert "in bfloat16, to which the dense ones (float32) were cast" in message


def test_wanda_leaves_survivors_and_sparsegpt_does_not(tmp_path):
    data = torch.randint(3, 120, (4, 24))
    dense, sparse, _ = make(tmp_path / "wanda", pruner="wanda", data=data)
    assert verify(sparse, dense).ok
    dense, sparse, _ = make(tmp_path / "sparsegpt", pruner="sparsegpt", data=data)
    result = verify(sparse, dense)
    assert result.ok and told(result, status="note") == {"survivors": 1}
    assert "sparsegpt updates the weights that stay" in next(f.message for f in result.findings if f.status == "note")


def step(folder):
    """One step of gradient descent with the zeros held, saved in place."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 120, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad * (parameter != 0)
    model.save_pretrained(folder, max_shard_size=SMALL)


def test_fine_tuning_keeps_zeros_and_changes_survivors(tmp_path):
    dense, sparse, _ = make(tmp_path)
    step(sparse)
    assert verify(sparse).ok
    result = verify(sparse, dense)
    assert set(told(result)) == {"survivors"} and told(result)["survivors"] >= 21
    assert "all 21 layers have all their zeros, and other values" in reasons(result)
    assert any(f.where == "model.norm.weight" for f in result.failed)
    edit(sparse / "config.json", lambda config: config["sparsity_config"].update(recovered={"method": "full"}))
    result = verify(sparse, dense)
    assert result.ok and "expected: recovered by full" in str(result.findings)


def test_what_recover_made_is_right(tmp_path):
    dense, sparse, _ = make(tmp_path)
    recover(sparse, torch.randint(3, 120, (24, 16)), "full", output_dir=tmp_path / "r", steps=2, lr=1e-3)
    result = verify(tmp_path / "r", dense)
    assert result.ok and told(result, status="note") == {"survivors": 1}


def test_another_model_cannot_be_compared_with(tmp_path):
    dense, sparse, _ = make(tmp_path)
    other = hf.LlamaForCausalLM(hf.LlamaConfig(**_text(intermediate_size=128)))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"9 parameters have other names or shapes, such as .*gate_proj.*\[128, 64\]"):
        verify(sparse, tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be read"):
        verify(sparse, tmp_path / "nowhere")
    edit_weights(dense, lambda name, weight: weight.mul_(1.5) if name.endswith("0.mlp.up_proj") else None)
    result = verify(sparse, dense)
    assert [f.where for f in result.failed] == ["model.layers.0.mlp.up_proj"]
    assert "1 of 21 layers" in reasons(result)


# ---- what a later step did


def merge(folder, modules):
    """A plain LoRA, as if trained, merged into the folder."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    adapted.merge_and_unload().save_pretrained(folder, max_shard_size=SMALL)


@pytest.mark.parametrize(
    "modules,which,kinds",
    [
        (["q_proj", "v_proj"], "6 of 21 layers lost", "(q_proj, v_proj)"),
        ("all-linear", "all 21 layers lost", "(q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, ...)"),
    ],
)
def test_a_merged_lora(modules, which, kinds, tmp_path):
    _, sparse, _ = make(tmp_path)
    merge(sparse, modules)
    result = verify(sparse)
    count = 6 if modules != "all-linear" else 21
    assert told(result) == {"zeros": count, "masks": count}
    text = reasons(result)
    assert which in text and kinds in text and "merge_and_unload() of a plain LoRA" in text and "merge_lora" in text


def test_a_few_lost_zeros(tmp_path):
    _, sparse, _ = make(tmp_path)

    def touch(name, weight):
        if name.endswith("layers.2.mlp.down_proj"):
            weight[0] = 1.0

    edit_weights(sparse, touch)
    result = verify(sparse)
    assert told(result) == {"zeros": 1, "masks": 1}
    assert result.failed[0].where == "model.layers.2.mlp.down_proj" and "fewer than the report's" in str(result.failed)
    assert "1 of 21 layers lost some of their zeros (down_proj)" in reasons(result)


def test_more_zeros(tmp_path):
    _, sparse, _ = make(tmp_path)
    edit_weights(sparse, lambda name, weight: weight.masked_fill_(weight.abs() < 0.1, 0))
    result = verify(sparse)
    assert told(result) == {"zeros": 21, "masks": 21}
    assert "have more zeros than reported" in reasons(result) and "pruned further" in reasons(result)
    (sparse / REPORT_FILE).unlink()
    result = verify(sparse)
    assert result.ok and told(result, status="note") == {"zeros": 21, "explanation": 1}


def quantized(weight, bits):
    """Rounded to `bits` with a scale for each row, and back."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / top
    return torch.fake_quantize_per_channel_affine(
        weight.float(), scale.float(), torch.zeros(len(scale), dtype=torch.int32), 0, -top, top
    ).to(weight.dtype)


def test_quantization_keeps_zeros_and_is_told(tmp_path):
    dense, sparse, _ = make(tmp_path)
    edit_weights(sparse, lambda name, weight: weight.copy_(quantized(weight, 4)))
    result = verify(sparse, dense)
    assert told(result) == {"survivors": 21}
    assert "all 21 layers take only few values, as after quantization" in reasons(result)
    assert "fine-tuned" not in reasons(result)
    edit_weights(sparse, lambda name, weight: weight.copy_(quantized(weight, 2)))
    result = verify(sparse)
    assert told(result) == {"zeros": 21, "masks": 21}
    assert "rounding to few values made zeros of small weights" in reasons(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.95])
def test_only_rounded_weights_are_on_a_grid(dtype, sparsity):
    weight = torch.randn(32, 4096) * 0.02
    weight[weight.abs() <= weight.abs().quantile(sparsity, dim=1, keepdim=True)] = 0
    weight = weight.to(dtype)
    assert not is_on_grid(weight)
    assert is_on_grid(quantized(weight, 4))
    if sparsity < 0.9:  # of the 8-bit values only the outer ones are left then, and bf16 has few more
        assert is_on_grid(quantized(weight, 8))
    groups = quantized(weight.reshape(-1, 128), 4).reshape(weight.shape)
    assert is_on_grid(groups) or sparsity > 0.9  # too few are left of 128 to tell


# ---- damage


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_not_a_number(layout, tmp_path):
    _, _, model = make(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
        model.model.embed_tokens.weight[0, 0] = torch.inf
    save_sparse(model, tmp_path / "n", layout=layout)
    result = verify(tmp_path / "n")
    assert {f.where for f in result.failed if f.check == "finite"} == {
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    }


def test_untied(tmp_path):
    _, sparse, model = make(tmp_path, "tied")
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    shutil.copytree(sparse, tmp_path / "u")
    for file in (tmp_path / "u").glob("model*"):
        file.unlink()
    save_file(state, tmp_path / "u/model.safetensors", metadata={"format": "pt"})
    result = verify(tmp_path / "u")
    assert [(f.check, f.where) for f in result.failed] == [("tied", "lm_head.weight")]


def test_a_packed_folder_with_a_flipped_bit(tmp_path):
    _, sparse, _ = make(tmp_path, layout="bitmask")
    file = sorted(sparse.glob("sparse*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    result = verify(sparse)
    assert told(result) == {"files": 1}
    assert "model.layers" in result.failed[0].message and "damaged" in result.failed[0].message


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_files_that_are_cut_or_gone(layout, tmp_path):
    _, sparse, _ = make(tmp_path, layout=layout)
    file = sorted(sparse.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    assert told(verify(sparse)) == {"files": 1}
    file.unlink()
    result = verify(sparse)
    assert told(result) == {"files": 1} and result.measured is None and file.name in result.failed[0].message


def test_plan_and_report_of_something_else(tmp_path):
    _, sparse, _ = make(tmp_path)
    config, report = (sparse / "config.json").read_text(), (sparse / REPORT_FILE).read_text()
    name = "model.layers.0.mlp.up_proj"
    edit(sparse / REPORT_FILE, lambda report: report["layers"].pop(name))
    assert [(f.check, f.where) for f in verify(sparse).failed] == [("report", name)]
    (sparse / REPORT_FILE).write_text(report)
    edit(sparse / REPORT_FILE, lambda report: report["layers"][name].update(planned=0.7))
    assert [(f.check, f.where) for f in verify(sparse).failed] == [("report", name)]
    (sparse / REPORT_FILE).write_text(report[:100])
    assert [(f.check, f.where) for f in verify(sparse).failed] == [("report", REPORT_FILE)]
    (sparse / REPORT_FILE).write_text(report)
    edit(sparse / "config.json", lambda c: c["sparsity_config"]["model"].update(type="gpt2", layers="0" * 64))
    assert told(verify(sparse)) == {"fingerprints": 2}
    (sparse / "config.json").write_text(config)
    edit(sparse / "config.json", lambda c: c["sparsity_config"].update(versions={}))
    assert verify(sparse).ok and told(verify(sparse), status="note") == {"fingerprints": 1}
    edit(sparse / "config.json", lambda c: c["sparsity_config"]["layers"].pop(name))
    assert {"plan", "fingerprints"} & set(told(verify(sparse))) == {"plan"}


# ---- recorded evaluations


def record(folder, model):
    """Evaluations of a text and a task, as recorded when `model` was scored."""
    same = {"confidence": 0.95, "resamples": 10, "seed": 0, "versions": {}, "weights": weights_fingerprint(model)}
    text = TextRecord("wikitext2", "test", {}, 16, 2, "windows", 2, 30, perplexity=Interval(9.0), against=None, **same)
    task = TaskRecord("arc", 1.0, 0, None, 5, metrics={}, against=None, harness="0", **same)
    Metrics((text,), (task,)).save(folder)


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_evaluated_before_the_last_change(layout, tmp_path):
    _, sparse, model = make(tmp_path, layout=layout)
    record(sparse, model)
    assert verify(sparse).ok and "evaluation" in told(verify(sparse), status="ok")
    record(sparse, model.bfloat16())  # scored in another dtype: still these weights
    assert verify(sparse).ok
    with torch.no_grad():
        model.model.norm.weight += 0.5
    record(sparse, model)
    result = verify(sparse)
    assert [(f.check, f.where) for f in result.failed] == [("evaluation", "wikitext2"), ("evaluation", "arc")]
    assert "evaluated before the weights were last changed" in result.failed[0].message


# ---- what cannot be verified


def test_bad_input(tmp_path):
    dense, sparse, _ = make(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a sparse model"):
        verify(dense)
    (sparse / "UNFINISHED").mkdir()
    with pytest.raises(ValueError, match="unfinished"):
        verify(sparse)
    (sparse / "UNFINISHED").rmdir()
    edit(sparse / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        verify(sparse)
