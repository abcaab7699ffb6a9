"""Models with packed weights: the same results as dense ones, in memory, loaded, copied, saved, compiled."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import transformers as hf

from hf_sparsity import BitmaskConfig, SparseModel, make_plan, pack_model, prune, save_sparse, unpack_model
from hf_sparsity.checkpoint.zeros import folder_bytes
from hf_sparsity.files import MARKER, check_finished
from hf_sparsity.runtime.linear import Packed, PackedLinear

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
SMALL = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, intermediate_size=136)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=2)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SMALL, intermediate_size=72, num_key_value_heads=2, num_local_experts=3)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, head_dim=32)
    ),
}


def pruned(kind, sparsity=0.6, **config):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    prune(model, make_plan(model, {"sparsity": sparsity, "pruner": "magnitude", **config}))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def same(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items()) and a.keys() == b.keys()


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """(a dense model, a packed folder of it)."""
    model = pruned(request.param)
    path = tmp_path_factory.mktemp("packed") / request.param
    save_sparse(model, path, layout="bitmask")
    return model, path


def load(path, **options):
    return hf.AutoModelForCausalLM.from_pretrained(path, quantization_config=BitmaskConfig(dequantize=False), **options)


def test_loaded_packed(folder, tmp_path):
    """The class is transformers' own, the logits are those of the dense model, and so are the weights saved again."""
    dense, path = folder
    model = load(path)
    assert type(model) is type(dense) and any(isinstance(module, Packed) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(model, IDS[:1, :1]), logits(dense, IDS[:1, :1]), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    described = json.loads((tmp_path / "again/config.json").read_text())
    assert described["quantization_config"]["layout"] == "bitmask" and "sparsity_config" in described
    again = type(dense).from_pretrained(tmp_path / "again")
    assert same(again.state_dict(), dense.state_dict())
    assert folder_bytes(tmp_path / "again") <= 1.01 * folder_bytes(path)
    unpack_model(model)
    assert same(model.state_dict(), dense.state_dict()) and not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_save_that_stops_in_between_is_known_as_unfinished(llama, tmp_path, monkeypatch):
    model = pack_model(copy.deepcopy(llama))
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / MARKER).exists()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("shutil.move", full)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished"):
        check_finished(tmp_path / "out")
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "out")
    check_finished(tmp_path / "out")
    assert isinstance(load(tmp_path / "out").model.layers[0].mlp.up_proj, PackedLinear)


def test_packed_in_memory(folder):
    dense, _ = folder
    model = pack_model(copy.deepcopy(dense))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)
    assert model.get_memory_footprint() < 0.75 * dense.get_memory_footprint()
    other = pack_model(copy.deepcopy(dense))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert same(unpack_model(model).state_dict(), dense.state_dict())


@pytest.fixture(scope="module")
def llama():
    return pruned("llama")


def test_generation_is_the_same(llama):
    model = pack_model(copy.deepcopy(llama))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **options), llama.generate(IDS[:1], **options))


def test_patterns_keep_their_codes():
    model = pack_model(dense := pruned("llama", 0.5, pattern="2:4"))
    assert model is dense
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {layer.header.group for layer in layers} == {(2, 4)}


def test_dtypes(llama):
    """Values keep theirs, whatever the model is cast to; a model may compute in another than its files have."""
    model = pack_model(copy.deepcopy(llama).to(torch.bfloat16))
    layer = model.model.layers[0].mlp.up_proj
    wanted = logits(copy.deepcopy(llama).to(torch.bfloat16).float())
    model.to(torch.float32)
    assert layer.header.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_training_is_refused(llama):
    model = pack_model(copy.deepcopy(llama))
    assert not any(parameter.requires_grad for parameter in model.parameters()) and model(IDS).logits is not None
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(RuntimeError, match="packed weights cannot be trained"):
        model(IDS)


def test_what_cannot_be_packed(llama):
    with pytest.raises(ValueError, match="enough zeros"):
        pack_model(MODELS["llama"]())
    model = pack_model(copy.deepcopy(llama))
    with pytest.raises(ValueError, match="quantized"):
        pack_model(model)
    with pytest.raises(ValueError, match="packed in memory"):
        save_sparse(model, "nowhere", layout="bitmask")
    with pytest.raises(RuntimeError, match="packed bytes only"):
        model.load_state_dict(llama.state_dict())
    with pytest.raises(ValueError, match="nothing in this LlamaForCausalLM is packed"):
        unpack_model(llama)
    with pytest.raises(ValueError, match="prefer='size'"):
        BitmaskConfig(dequantize=False, prefer="size")
    for load_with in (BitmaskConfig, partial(SparseModel.from_pretrained, "nowhere")):
        with pytest.raises(ValueError, match="dequantize='no'"):
            load_with(dequantize="no")


def test_loaded_by_us(folder):
    dense, path = folder
    model = SparseModel.from_pretrained(path, dequantize=False)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)


def test_compiled_as_one_operation(llama):
    layer = pack_model(copy.deepcopy(llama)).model.layers[0].mlp.up_proj
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.library.opcheck(torch.ops.hf_sparsity.packed_linear, (x, layer.packed, None, layer.out_features, 0))
