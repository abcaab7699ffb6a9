"""A model whose blocks are read from its checkpoint computes what the loaded one does, and touches no file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from hf_sparsity.algorithm import GRAM
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.checkpoint import system
from hf_sparsity.checkpoint.streamed import open_streamed, read_blocks
from hf_sparsity.model.fingerprint import model_fingerprint
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.offload import onload, weight_store
from hf_sparsity.streaming.stream import stream_blocks
from tests.conftest import ZOO, tiny, tiny_batch
from tests.tools import row_and_column

KINDS = [
    "llama", "qwen2_window", "gemma3", "gpt2", "bloom", "falcon", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3",
    "mamba", "t5",
]  # fmt: skip


def auto_of(name):
    return getattr(hf, ZOO[name]()[0])


def saved(name, folder, shard="50GB", **changes):
    """The tiny model in a folder, the buffers that are saved away from what they are at first."""
    model = tiny(name, **changes)
    state = model.state_dict()
    for key, buffer in model.named_buffers():
        if key in state and buffer.is_floating_point():
            buffer.add_(torch.linspace(-0.3, 0.3, buffer.numel(), dtype=buffer.dtype).reshape(buffer.shape))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def rewrite(folder, change):
    """Replaces the tensors of a checkpoint of one file by `change(tensors)`."""
    file = folder / "model.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.safetensors"))}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def statistics(model, batches):
    found = {}
    for block in stream_blocks(model, find_layers(model), batches, frozenset({GRAM}), rewrites=False):
        for name, layer in block.layers.items():
            stats = layer.stats
            found[name] = None if stats is None else (stats.tokens, stats.gram.clone())
    return found


def assert_at_rest(model):
    """Blocks are on the meta device, everything else is not, and no block is held."""
    blocks = tuple(f"{block.name}." for block in find_layers(model).blocks)
    for name, parameter in model.named_parameters():
        assert (parameter.device.type == "meta") == name.startswith(blocks), name
    assert not any(buffer.device.type == "meta" for buffer in model.buffers())
    assert weight_store(model).held_block is None


@pytest.mark.parametrize(("name", "shard"), row_and_column(KINDS, ["100KB", "50GB"]))
def test_streamed_equals_loaded(name, shard, tmp_path):
    saved(name, tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "100KB")
    before = digest(tmp_path)
    loaded, model = auto_of(name).from_pretrained(tmp_path), open_streamed(tmp_path, auto_class=auto_of(name))
    assert_at_rest(model)
    assert not model.training and model.device.type == "cpu" and model.dtype == loaded.dtype
    assert torch.equal(logits(model, tiny_batch(name)), logits(loaded, tiny_batch(name)))
    assert_at_rest(model)
    batches = prepare_batches(model, [tiny_batch(name)])
    expected, found = statistics(loaded, batches), statistics(model, batches)
    assert list(found) == list(expected)
    for layer, value in expected.items():
        if value is None:
            assert found[layer] is None
        else:
            assert found[layer][0] == value[0] > 0, layer
            assert torch.equal(found[layer][1], value[1]), layer
    assert_at_rest(model)
    assert model_fingerprint(model, find_layers(model)) == model_fingerprint(loaded, find_layers(loaded))
    assert digest(tmp_path) == before


@pytest.mark.parametrize("name", KINDS)
def test_names_are_those_of_the_checkpoint(name, tmp_path):
    saved(name, tmp_path, "100KB")
    model = open_streamed(tmp_path, auto_class=auto_of(name))
    weights = weight_store(model)
    blocks = [block.name for block in find_layers(model).blocks]
    keys = [weights.block_keys(block) for block in blocks]
    everything = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert sorted([*weights.other_keys(), *(key for block in keys for key in block)]) == sorted(everything)
    for block, expected in zip(blocks, keys, strict=True):
        with onload(model.get_submodule(block)):
            inner = model.get_submodule(block).state_dict()
            state = {f"{block}.{key}": value.clone() for key, value in inner.items()}
        assert set(revert_weight_conversion(model, state)) == set(expected)
    loaded = auto_of(name).from_pretrained(tmp_path)
    assert model.config.to_dict() == loaded.config.to_dict()
    assert model.name_or_path == model.config._name_or_path == str(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied, tmp_path):
    config = ZOO["llama"]()[1]
    config.tie_word_embeddings = tied
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, loaded = open_streamed(tmp_path), hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(logits(model, tiny_batch("llama")), logits(loaded, tiny_batch("llama")))


@pytest.mark.parametrize("same", [True, False])
def test_both_of_two_tied_weights_in_the_checkpoint(same, tmp_path):
    """As transformers: tied if they are equal; if not, the checkpoint is believed."""
    config = ZOO["llama"]()[1]
    config.tie_word_embeddings = True
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * (1 if same else 2)})
    model, loaded = open_streamed(tmp_path), hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    assert torch.equal(logits(model, tiny_batch("llama")), logits(loaded, tiny_batch("llama")))


@pytest.mark.parametrize(
    ("name", "written", "given"),
    row_and_column(
        ["t5", "llama", "mixtral"],
        [torch.bfloat16, torch.float32],
        [torch.float16, "auto", "bfloat16", torch.float32],
    ),
)
def test_dtypes(name, written, given, tmp_path):
    """T5 keeps some weights in float32 when all else is float16."""
    saved(name, tmp_path, dtype=written)
    loaded = auto_of(name).from_pretrained(tmp_path, dtype=given)
    model = open_streamed(tmp_path, auto_class=auto_of(name), dtype=given)
    dtypes = {key: value.dtype for key, value in loaded.state_dict().items()}
    assert {key: value.dtype for key, value in model.state_dict().items()} == dtypes
    assert len(set(dtypes.values())) == (2 if name == "t5" and given is torch.float16 else 1)
    assert torch.equal(logits(model, tiny_batch(name)), logits(loaded, tiny_batch(name)))
    assert model.config.dtype == loaded.config.dtype


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_without_a_dtype_in_the_config_the_checkpoint_decides(given, tmp_path):
    saved("llama", tmp_path, dtype=given)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_streamed(tmp_path).dtype == hf.LlamaForCausalLM.from_pretrained(tmp_path).dtype == given


def test_a_checkpoint_of_the_base_model(tmp_path):
    """GPT-2 on the Hub has no `transformer.` in its names; what is reverted must have none either."""
    saved("gpt2", tmp_path)
    rewrite(tmp_path, lambda t: {key.removeprefix("transformer."): value for key, value in t.items()})
    model, loaded = open_streamed(tmp_path), hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(logits(model, tiny_batch("gpt2")), logits(loaded, tiny_batch("gpt2")))
    keys = weight_store(model).block_keys("transformer.h.1")
    assert len(keys) == 12 and all(key.startswith("h.1.") for key in keys)
    state = {f"transformer.h.1.{key}": torch.zeros(1) for key in model.transformer.h[1].state_dict()}
    assert set(revert_weight_conversion(model, state)) == set(keys)


def test_a_base_model_from_a_checkpoint_with_a_head(tmp_path):
    saved("gpt2", tmp_path)
    model, loaded = open_streamed(tmp_path, auto_class=hf.AutoModel), hf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(model, tiny_batch("gpt2")), logits(loaded, tiny_batch("gpt2")))
    keys = weight_store(model).block_keys("h.1")
    assert len(keys) == 12 and all(key.startswith("transformer.h.1.") for key in keys)
    state = {f"h.1.{key}": torch.zeros(1) for key in model.h[1].state_dict()}
    assert set(revert_weight_conversion(model, state)) == set(keys)


def test_what_the_model_has_no_use_for_is_left_out(tmp_path):
    saved("llama", tmp_path)
    rewrite(tmp_path, lambda t: t | {"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)})
    weights = weight_store(open_streamed(tmp_path))
    assert not any("layers.9" in key for key in weights.other_keys())


def test_buffers_of_blocks_are_those_of_the_checkpoint(tmp_path):
    """DeepSeek-V3 routes by a buffer that is trained; it is resident and counts among its block's tensors."""
    saved("deepseek_v3", tmp_path)
    model = open_streamed(tmp_path)
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.get_buffer(key), load_file(tmp_path / "model.safetensors")[key])
    assert model.get_buffer(key).abs().sum() > 0
    assert key in weight_store(model).block_keys("model.layers.1")


def test_generation_config(tmp_path):
    saved("llama", tmp_path)
    hf.GenerationConfig(max_new_tokens=7, temperature=0.3, do_sample=True).save_pretrained(tmp_path)
    assert open_streamed(tmp_path).generation_config.temperature == 0.3
    (tmp_path / "generation_config.json").unlink()
    assert open_streamed(tmp_path).generation_config.eos_token_id == 2


class Shared:
    """An auto class: blocks 0 and 2 are one module, block 1 uses one of its parameters and one of its own twice."""

    @staticmethod
    def from_config(config, **options):
        options.pop("trust_remote_code", None)
        model = hf.AutoModelForCausalLM.from_config(config, **options)
        layers = model.model.layers
        layers[2] = layers[0]
        model.all_tied_weights_keys["model.layers.1.mlp.up_proj.weight"] = "model.layers.0.mlp.up_proj.weight"
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        model.all_tied_weights_keys["model.layers.1.self_attn.v_proj.weight"] = "model.layers.1.self_attn.k_proj.weight"
        layers[1].self_attn.v_proj.weight = layers[1].self_attn.k_proj.weight
        return model


@pytest.mark.parametrize("kept", [0, 2])
def test_blocks_that_share(kept, tmp_path):
    """Whichever of its names a shared weight is stored under."""
    config = ZOO["llama"]()[1]
    loaded = Shared.from_config(config).eval()
    drop = f"model.layers.{2 - kept}."
    tensors = {key: value.clone() for key, value in loaded.state_dict().items() if not key.startswith(drop)}
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.self_attn.v_proj.weight"]
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = open_streamed(tmp_path, auto_class=Shared)
    assert_at_rest(model)
    for _ in range(2):
        assert torch.equal(logits(model, tiny_batch("llama")), logits(loaded, tiny_batch("llama")))
        assert_at_rest(model)
    batches = prepare_batches(model, [tiny_batch("llama")])
    expected, found = statistics(loaded, batches), statistics(model, batches)
    assert found["model.layers.0.mlp.gate_proj"][0] == 2 * found["model.layers.1.mlp.gate_proj"][0]  # visited twice
    for layer, value in found.items():
        assert torch.equal(value[1], expected[layer][1]), layer
    assert_at_rest(model)


def altered(model, block, folder):
    """Writes a block's tensors times 3 under the names of the source, as pruning does; returns the weight map."""
    with onload(model.get_submodule(block)):
        inner = model.get_submodule(block).state_dict()
        state = {f"{block}.{key}": value * 3 for key, value in inner.items()}
    reverted = {k: v.contiguous().clone() for k, v in revert_weight_conversion(model, state).items()}
    folder.mkdir()
    save_file(reverted, folder / "shard.safetensors", {"format": "pt"})
    return dict.fromkeys(reverted, "shard.safetensors")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "t5"])
def test_redirect(name, tmp_path):
    source, shards = tmp_path / "source", tmp_path / "shards"
    loaded = saved(name, source, "100KB")
    before = digest(source)
    model = open_streamed(source, auto_class=auto_of(name))
    block = find_layers(model).blocks[1].name
    weight_map = altered(model, block, shards)
    weights = weight_store(model)
    key = next(key for key in weights if key.startswith(f"{block}."))
    value = weights[key].clone()
    weights.redirect(block, shards, weight_map | {"lm_head.weight": "elsewhere.safetensors"})
    assert torch.equal(weights[key], value * 3)
    weights.release()
    with torch.no_grad():
        for parameter in loaded.get_submodule(block).parameters():
            parameter.mul_(3)
    assert torch.equal(logits(model, tiny_batch(name)), logits(loaded, tiny_batch(name)))
    assert set(weight_store(model).block_keys(block)) == set(weight_map)
    assert_at_rest(model)
    assert digest(source) == before


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_redirect_to_an_incomplete_folder(name, tmp_path):
    saved(name, tmp_path / "source")
    model = open_streamed(tmp_path / "source")
    weights, block, shards = weight_store(model), "model.layers.1", tmp_path / "shards"
    weight_map = altered(model, block, shards)
    key = next(key for key in weight_map if "down_proj" in key or "w2" in key)
    save_file({"x": torch.ones(1)}, shards / "other.safetensors")
    for incomplete in ({k: v for k, v in weight_map.items() if k != key}, weight_map | {key: "other.safetensors"}):
        with pytest.raises(ValueError, match=r"lacks 1 tensors of model\.layers\.1"):
            weights.redirect(block, shards, incomplete)
    with pytest.raises(ValueError, match="no block is named"):
        weights.redirect("model.layers.7", shards, weight_map)
    assert not weights.is_written(f"{block}.input_layernorm.weight")


def test_read_blocks_for_a_model_in_memory(tmp_path):
    """Fused experts from the shard's single ones, and the model is left as it is."""
    for name in ("mixtral", "gpt2"):
        source = tmp_path / name
        loaded = saved(name, source)
        block = find_layers(loaded).blocks[1].name
        weight_map = altered(loaded, block, source / "shards")
        before = {key: value.clone() for key, value in loaded.state_dict().items()}
        identities = {key: id(value) for key, value in loaded.named_parameters()}
        [(found, values)] = read_blocks(loaded, source / "shards", {block: weight_map})
        assert found == block and set(values) == {
            f"{block}.{k}" for k, _ in loaded.get_submodule(block).named_parameters()
        }
        for key, value in values.items():
            assert torch.equal(value, before[key] * 3), key
        assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
        assert identities == {key: id(value) for key, value in loaded.named_parameters()}
        assert "_weight_conversions" not in vars(loaded)


def changed_block(model, index=0):
    """Changes a layer of the first block as pruning does; yields while it is lent."""
    block = find_layers(model).blocks[index]
    weight = next(iter(block.weights.values()))
    return block, weight, onload(block.module)


def test_a_change_that_nobody_wrote_is_an_error(tmp_path):
    saved("llama", tmp_path)
    before = digest(tmp_path)
    model = open_streamed(tmp_path)
    block, weight, lent = changed_block(model)
    with pytest.raises(RuntimeError, match="pass output_dir"), lent as onloaded:
        onloaded.write(weight, torch.zeros(weight.shape))
    assert_at_rest(model)
    with onload(block.module):  # and the next to read it gets what the checkpoint has
        assert torch.equal(weight.read(), load_file(tmp_path / "model.safetensors")[weight.parameter])
    with pytest.raises(KeyError, match="another"), onload(block.module) as onloaded:
        onloaded.write(weight, torch.zeros(weight.shape))
        raise KeyError("another")  # is not hidden
    assert_at_rest(model)
    assert digest(tmp_path) == before


def test_a_change_that_was_written_is_read_again(tmp_path):
    saved("llama", tmp_path / "source")
    before = digest(tmp_path / "source")
    model = open_streamed(tmp_path / "source")
    weight_map = altered(model, "model.layers.0", tmp_path / "shards")
    block, weight, lent = changed_block(model)
    with lent as onloaded:
        value = 3 * weight.read()
        onloaded.write(weight, value)
        weight_store(model).redirect(block.name, tmp_path / "shards", weight_map)
        assert torch.equal(weight.read(), value)
    assert_at_rest(model)
    with onload(block.module):
        assert torch.equal(weight.read(), value)
    _, _, lent = changed_block(model)
    with pytest.raises(RuntimeError, match="pass output_dir"), lent as onloaded:  # a second change is not on disk
        onloaded.write(weight, torch.zeros(weight.shape))
    assert digest(tmp_path / "source") == before


def test_one_block_is_held_at_a_time(tmp_path, capsys):
    saved("llama", tmp_path)
    capsys.readouterr()
    model = open_streamed(tmp_path)
    weights = weight_store(model)
    assert len(weights) == 27 and "model.embed_tokens.weight" not in weights and "model.layers.0.x" not in weights
    first = weights["model.layers.0.mlp.up_proj.weight"]
    assert weights["model.layers.0.mlp.up_proj.weight"] is first and weights.held_block == "model.layers.0"
    assert all(parameter.device.type == "meta" for parameter in model.model.layers.parameters())
    first = weakref.ref(first)
    last = weakref.ref(weights["model.layers.2.mlp.up_proj.weight"])
    assert weights.held_block == "model.layers.2" and first() is None and last() is not None
    assert capsys.readouterr().err == ""  # no progress bar for each block
    weights.release()
    assert weights.held_block is None and last() is None
    assert not weights.is_written("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(KeyError):
        weights["lm_head.weight"]


@contextmanager
def read_ahead(monkeypatch, folder):
    """{file: the bytes that the system is asked to read ahead inside, in pieces}; at the end all of them are there."""
    pieces: dict[str, list[bytes]] = {}
    names = {file.stat().st_ino: file.name for file in folder.glob("*.safetensors")}

    def send(out, descriptor, offset, length):
        """As the system may: less than what was asked for."""
        assert os.path.samestat(os.fstat(out), os.stat(os.devnull))
        content = os.pread(descriptor, min(length, 512), offset)
        pieces.setdefault(names[os.fstat(descriptor).st_ino], []).append(content)
        return len(content)

    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(os, "sendfile", send)
        yield pieces
        for thread in set(threading.enumerate()) - before:
            thread.join()


def bytes_of(weights, folder, *blocks):
    """{file: the bytes of the tensors of these blocks in it, in the order in which they are stored}."""
    content = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        keys = [key for block in blocks for key in weights.block_keys(f"model.layers.{block}") if key in tensors]
        content |= {file.name: b"".join(tensors[key].numpy().tobytes() for key in keys)} if keys else {}
    return content


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_prefetch_reads_exactly_the_bytes_of_the_blocks(shard, tmp_path, monkeypatch):
    saved("llama", tmp_path, shard)
    weights = weight_store(open_streamed(tmp_path))
    with read_ahead(monkeypatch, tmp_path) as pieces:
        weights.prefetch("model.layers.0", "model.layers.2")
    assert weights.held_block is None and sum(map(len, pieces.values())) > 100
    assert {file: b"".join(parts) for file, parts in pieces.items()} == bytes_of(weights, tmp_path, 0, 2)
    monkeypatch.delattr(os, "sendfile")
    weights.prefetch("model.layers.1")  # silently nothing
    with pytest.raises(ValueError, match="no block is named"):
        weights.prefetch("layers.1")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="asks Linux what it has in memory")
def test_prefetched_bytes_are_in_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**20) * 64)
    with open(path, "rb", buffering=0) as file:

        def there(offset):
            try:
                return os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False

        def forget():
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        forget()
        if there(2**25):
            pytest.skip("this file system keeps its files in memory")
        forget()
        system.read_ahead([(str(path), 2**24, 2**25)])
        assert all(there(offset) for offset in range(2**24, 2**25, 2**12))
        assert not there(2**26 - 1)


def test_reading_a_block_asks_for_the_next(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    weights = weight_store(open_streamed(tmp_path))
    for index, blocks in ((0, (0, 1)), (2, (2,))):
        with read_ahead(monkeypatch, tmp_path) as pieces:
            _ = weights[f"model.layers.{index}.mlp.up_proj.weight"]
        assert {file: b"".join(parts) for file, parts in pieces.items()} == bytes_of(weights, tmp_path, *blocks)


def hub_cache(source, cache):
    """A folder as a repository in the cache of the Hub."""
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source, repository / "snapshots" / ("a" * 40))


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_a_model_from_the_hub(shard, tmp_path):
    loaded = saved("llama", tmp_path / "source", shard)
    hub_cache(tmp_path / "source", tmp_path / "cache")
    model = open_streamed("someone/tiny", cache_dir=tmp_path / "cache", local_files_only=True, token=None)
    assert torch.equal(logits(model, tiny_batch("llama")), logits(loaded, tiny_batch("llama")))
    assert model.name_or_path == "someone/tiny"


def test_a_subfolder(tmp_path):
    loaded = saved("llama", tmp_path / "inner", "100KB")
    model = open_streamed(tmp_path, subfolder="inner")
    assert torch.equal(logits(model, tiny_batch("llama")), logits(loaded, tiny_batch("llama")))


def fails(folder, match, **options):
    with pytest.raises(ValueError, match=match):
        open_streamed(folder, **options)


def test_what_is_missing_is_named(tmp_path):
    saved("mixtral", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for key in ("model.layers.1.input_layernorm.weight", "model.norm.weight"):
        rewrite(tmp_path, lambda _, key=key: {k: v for k, v in whole.items() if k != key})
        fails(tmp_path, f"lacks 1 parameters of the model: {key}")
    rewrite(tmp_path, lambda _: {k: v for k, v in whole.items() if "layers.1.block_sparse_moe.experts" not in k})
    fails(tmp_path, r"lacks 2 parameters of the model: model\.layers\.1\.mlp\.experts\.down_proj, ")
    rewrite(tmp_path, lambda _: {k: v for k, v in whole.items() if "layers.1.block_sparse_moe.experts.3" not in k})
    fails(tmp_path, "another shape than the config says")


def test_a_shape_that_the_config_does_not_say(tmp_path):
    saved("llama", tmp_path)
    rewrite(tmp_path, lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.ones(3, 4)})
    fails(tmp_path, r"model\.layers\.2\.mlp\.up_proj\.weight is \[3, 4\], not \[96, 64\]")


@pytest.mark.parametrize("keep", [3, 200, -1])
def test_a_file_that_was_cut_short(keep, tmp_path):
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(tmp_path, r"model\.safetensors (cannot be read as safetensors|has \d+ bytes)")


def test_a_shard_that_is_not_there(tmp_path):
    saved("llama", tmp_path, "100KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    fails(tmp_path, "cannot be read as safetensors")


def test_only_safetensors(tmp_path):
    model = saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    fails(tmp_path, "only safetensors can be read block by block")


def test_a_quantized_checkpoint(tmp_path):
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    fails(tmp_path, "is quantized")


def test_weights_named_by_the_config(tmp_path):
    """transformers reads the file that `transformers_weights` names; one outside the folder is refused."""
    loaded = saved("llama", tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert torch.equal(logits(open_streamed(tmp_path), tiny_batch("llama")), logits(loaded, tiny_batch("llama")))
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other.safetensors"}))
    fails(tmp_path, "is not the name of a safetensors file")


def test_arguments(tmp_path):
    saved("llama", tmp_path)
    fails(tmp_path, "unknown arguments", device_map="auto")
    fails(tmp_path, "dtype='bf17' is not known", dtype="bf17")


class Around:
    """An auto class: the head has a module of a block as a child of its own."""

    @staticmethod
    def from_config(config, **options):
        options.pop("trust_remote_code", None)
        model = hf.AutoModelForCausalLM.from_config(config, **options)
        model.again = model.model.layers[0].mlp
        return model


def test_models_that_cannot_be_streamed(tmp_path):
    model = saved("llama", tmp_path)
    rewrite(
        tmp_path,
        lambda t: t | {k.replace("model.layers.0.mlp", "again"): v for k, v in t.items() if "layers.0.mlp" in k},
    )
    fails(tmp_path, r"again\.[a-z_]+ is also part of a block", auto_class=Around)
    copied = copy.deepcopy(model)
    assert weight_store(copied) is None
