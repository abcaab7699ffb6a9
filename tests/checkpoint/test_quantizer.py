"""Packed folders: bit-equal through plain transformers for 20 architectures, refusals, damage, hostile folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from hf_sparsity import make_plan, prune
from hf_sparsity.checkpoint import packed_folder as packs
from hf_sparsity.checkpoint.bitmask import codec
from hf_sparsity.checkpoint.packed_folder import METHOD
from hf_sparsity.checkpoint.quantizer import BitmaskConfig, BitmaskQuantizer
from hf_sparsity.checkpoint.save import save_sparse
from hf_sparsity.checkpoint.transformers_internals import ASKS_FOR_DTYPES, AUTO_QUANTIZER_MAPPING
from hf_sparsity.publish.layouts import pack, unpack
from tests.conftest import _CAUSAL, ZOO, _text, tiny

SMALL = "60KB"  # a tiny model in several shards
_VISION = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
MORE = {
    "llama_tied": lambda: (_CAUSAL, hf.LlamaConfig(**_text(tie_word_embeddings=True))),
    "phi3": lambda: (_CAUSAL, hf.Phi3Config(**_text())),
    "gpt_neox": lambda: (
        _CAUSAL,
        hf.GPTNeoXConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
        ),
    ),
    "bert": lambda: ("AutoModelForMaskedLM", hf.BertConfig(vocab_size=128, **_VISION)),
    "vit": lambda: ("AutoModelForImageClassification", hf.ViTConfig(image_size=32, patch_size=8, **_VISION)),
}
ARCHITECTURES = sorted(ZOO | MORE)


def build(name, dtype=torch.float32, sparsity=0.6, pattern="unstructured"):
    """A pruned tiny model and its Auto class."""
    if name in ZOO:
        auto, model = ZOO[name]()[0], tiny(name, dtype)
    else:
        auto, config = MORE[name]()
        torch.manual_seed(1)
        model = getattr(hf, auto).from_config(config, dtype=dtype).eval()
    prune(model, make_plan(model, {"sparsity": sparsity, "pattern": pattern, "pruner": "magnitude"}))
    return getattr(hf, auto), model


def assert_equal(model, expected):
    """All tensors of the same names, dtypes and bits."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


def assert_ordinary(model):
    """Nothing is left of how it was loaded."""
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    assert not {"quantization_config", "transformers_weights"} & set(model.config.to_dict())
    assert "_adjust_missing_and_unexpected_keys" not in vars(model)
    assert "Unpack" not in repr([getattr(c, "operations", ()) for c in model._weight_conversions])


def round_trip(name, dtype, shards, folder):
    auto, model = build(name, dtype)
    for layout, stem in (("dense", "model"), ("bitmask", "sparse")):
        save_sparse(model, folder / layout, layout=layout, max_shard_size=shards)
        assert (len(list((folder / layout).glob(f"{stem}*.safetensors"))) > 1) == (shards is not None)
    (folder / "bitmask").rename(folder / "packed")
    dense = auto.from_pretrained(folder / "dense", dtype=dtype)
    for key, value in dense.state_dict().items():  # transformers keeps some in float32, whatever was asked for
        assert torch.equal(value, model.state_dict()[key].to(value.dtype)), key
    packed, info = auto.from_pretrained(folder / "packed", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(packed, dense)
    assert_ordinary(packed)
    save_sparse(packed, folder / "again")
    assert (folder / "again/config.json").read_text() == (folder / "dense/config.json").read_text()
    assert_equal(auto.from_pretrained(folder / "again", dtype=dtype), dense)
    save_sparse(packed, folder / "packed again", layout="bitmask")
    assert_equal(auto.from_pretrained(folder / "packed again", dtype=dtype), dense)


# One of each way that weights lie in a checkpoint: plain, transposed, tied, experts fused and apart, no text model.
QUICK = ("llama", "gpt2", "llama_tied", "gpt_oss", "deepseek_v3", "vit")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_every_architecture(name, tmp_path):
    round_trip(name, torch.bfloat16, SMALL, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,shards", [(torch.bfloat16, None), (torch.float32, None), (torch.float32, SMALL)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_in_all_ways(name, dtype, shards, tmp_path):
    round_trip(name, dtype, shards, tmp_path)


@pytest.mark.slow
def test_every_causal_architecture(tmp_path):
    """All that `shrink.py` can build: what is packed is what is loaded."""
    from tests.model.shrink import causal_configs, shrunk

    failed, passed = {}, 0
    for name, config_class in causal_configs().items():
        model = shrunk(config_class)
        if model is None:
            continue
        try:
            prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
            save_sparse(model, tmp_path / name / "dense")
            save_sparse(model, tmp_path / name / "packed", layout="bitmask")
            auto = hf.AutoModelForCausalLM
            dense = auto.from_pretrained(tmp_path / name / "dense", dtype=torch.float32)
            assert_equal(auto.from_pretrained(tmp_path / name / "packed", dtype=torch.float32), dense)
            passed += 1
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())
    assert passed > 130


# ---- ways to load


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folders `dense`, `packed` (several files) and `one` (one file) of a pruned model."""
    folder = tmp_path_factory.mktemp("llama")
    _, model = build("llama")
    save_sparse(model, folder / "dense", max_shard_size=SMALL)
    save_sparse(model, folder / "one", layout="bitmask")
    pack(folder / "dense", folder / "packed")
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    _, model = build("mixtral")
    save_sparse(model, folder / "dense", max_shard_size=SMALL)
    pack(folder / "dense", folder / "packed")
    return folder


@pytest.mark.parametrize(
    "options",
    [{"dtype": "auto"}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "disk"}}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_options(family, options, request, tmp_path):
    folder = request.getfixturevalue(family)
    dense = hf.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=options.get("dtype", "auto"))
    if "disk" in str(options):
        options = options | {"offload_folder": str(tmp_path)}
        if not ASKS_FOR_DTYPES:
            with pytest.raises(ValueError, match="cannot be offloaded to disk"):
                hf.AutoModelForCausalLM.from_pretrained(folder / "packed", **options)
            return
    packed = hf.AutoModelForCausalLM.from_pretrained(folder / "packed", **options)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(packed(ids).logits, dense(ids).logits)


def test_headless_new_head_and_subfolder(llama):
    body = hf.AutoModel.from_pretrained(llama / "packed")
    assert_equal(body, hf.AutoModel.from_pretrained(llama / "dense"))
    _, info = hf.AutoModelForSequenceClassification.from_pretrained(llama / "packed", output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    inside = hf.AutoModelForCausalLM.from_pretrained(llama, subfolder="packed")
    assert_equal(inside, hf.AutoModelForCausalLM.from_pretrained(llama / "dense"))


@pytest.mark.parametrize("folder", ["packed", "one"])
def test_by_hub_id(llama, folder, tmp_path):
    """From the Hub's cache, where each file is a link to elsewhere."""
    home = tmp_path / "models--me--tiny"
    snapshot, blobs = home / "snapshots" / ("a" * 40), home / "blobs"
    for path in (snapshot, blobs, home / "refs"):
        path.mkdir(parents=True)
    (home / "refs/main").write_text("a" * 40)
    for number, file in enumerate((llama / folder).iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    model = hf.AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path, local_files_only=True)
    assert_equal(model, hf.AutoModelForCausalLM.from_pretrained(llama / "dense"))
    pack_again = unpack(snapshot, tmp_path / "dense")
    assert_equal(hf.AutoModelForCausalLM.from_pretrained(pack_again), model)


def test_some_experts_packed_and_some_not(tmp_path):
    """Positions in transformers' lists of experts hold, whatever the form of each."""
    _, model = build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[2].normal_()
    save_sparse(model, tmp_path / "packed", layout="bitmask")
    assert_equal(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_codes_of_the_plan(name, tmp_path):
    """2:4 takes 0.75 bits a weight for its mask, also where weights are stored as [in, out]."""
    auto, model = build(name, torch.bfloat16, sparsity=0.5, pattern="2:4")
    save_sparse(model, tmp_path / "packed", layout="bitmask")
    codes = 0
    for key, stored in load_file(tmp_path / "packed/sparse.safetensors").items():
        if stored.dtype == torch.uint8:
            header = codec.read_header(stored)
            assert header.group == (2, 4), key
            assert len(stored) <= header.size * 8.75 / 8 + 64 + 14
            codes += 1
    assert codes >= 6
    assert_equal(auto.from_pretrained(tmp_path / "packed"), model)


def test_trains(llama):
    model = hf.AutoModelForCausalLM.from_pretrained(llama / "packed")
    assert all(p.requires_grad for p in model.parameters())
    ids = torch.arange(3, 15)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = float(model(ids, labels=ids).loss.detach())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert float(model(ids, labels=ids).loss.detach()) < before


# ---- folders


def test_unpack_gives_the_same_files(llama, tmp_path):
    (llama / "dense/README.md").write_text("card")
    shutil.rmtree(llama / "packed")
    pack(llama / "dense", llama / "packed")
    unpack(llama / "packed", tmp_path / "again")
    names = sorted(f.name for f in (llama / "dense").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "again").iterdir()) and len(names) > 4
    for name in names:
        if name.endswith(".json"):
            assert json.loads((tmp_path / "again" / name).read_text()) == json.loads(
                (llama / "dense" / name).read_text()
            )
        else:
            assert (tmp_path / "again" / name).read_bytes() == (llama / "dense" / name).read_bytes(), name


def test_size(tmp_path):
    _, model = build("llama", torch.bfloat16, sparsity=0.5)
    save_sparse(model, tmp_path / "packed", layout="bitmask")
    dense = bits = 0
    for parameter in model.parameters():
        zeros = int((parameter == 0).sum())
        dense += 0 if zeros else parameter.nbytes
        bits += (parameter.numel() * 17 - 16 * zeros) if zeros else 0
    size = (tmp_path / "packed/sparse.safetensors").stat().st_size
    assert dense + bits / 8 < size < dense + bits / 8 + 21 * (64 + 14) + 4096


def test_report_and_tokenizer_go_along(tmp_path):
    model = tiny("llama")
    report = prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))

    class Tokenizer:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.json").write_text("{}")

    save_sparse(model, tmp_path / "packed", layout="bitmask", report=report, tokenizer=Tokenizer())
    assert {"sparsity_report.json", "tokenizer.json"} < {f.name for f in (tmp_path / "packed").iterdir()}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1)
    with pytest.raises(RuntimeError, match="zeros where the report has"):
        save_sparse(model, tmp_path / "lost", layout="bitmask", report=report)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["packed"]


# ---- refusals


def test_without_the_package_the_error_names_it(llama, monkeypatch):
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)
    for folder in ("packed", "one"):
        with pytest.raises((OSError, ValueError), match="import hf_sparsity"):
            hf.AutoModelForCausalLM.from_pretrained(llama / folder)


def test_refusals_when_loading(llama):
    with pytest.raises(ValueError, match="tensor parallelism"), pytest.warns(FutureWarning):
        hf.AutoModelForCausalLM.from_pretrained(llama / "packed", tp_plan="auto")
    with pytest.raises(ValueError, match="BitmaskConfig"):
        quantized = hf.BitsAndBytesConfig(load_in_4bit=True)
        hf.AutoModelForCausalLM.from_pretrained(llama / "packed", quantization_config=quantized)
    with pytest.raises(ValueError, match="prune"):
        described = json.loads((llama / "packed/config.json").read_text())["quantization_config"]
        hf.AutoModelForCausalLM.from_pretrained(llama / "dense", quantization_config=BitmaskConfig(**described))
    with pytest.raises(ValueError, match="are not in its files"):
        hf.AutoModelForCausalLM.from_pretrained(llama / "packed", num_hidden_layers=4)
    with pytest.raises(ValueError, match="are not in its files"):
        hf.AutoModel.from_pretrained(llama / "packed", num_hidden_layers=4)


@pytest.mark.parametrize("before", [None, "0"])
def test_tensors_are_taken_one_by_one(llama, tmp_path, monkeypatch, before):
    """Not by transformers' threads, which hold Python's lock while they wait for the disk; its switch is put back."""
    from transformers import core_model_loading

    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.setenv(switch, before) if before else monkeypatch.delenv(switch, raising=False)
    pools, pool = [], core_model_loading.ThreadPoolExecutor
    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", lambda *a, **k: pools.append(1) or pool(*a, **k))
    hf.AutoModelForCausalLM.from_pretrained(llama / "packed")
    assert not pools and os.environ.get(switch) == before
    hf.AutoModelForCausalLM.from_pretrained(llama / "dense")
    assert pools
    shutil.copytree(llama / "one", tmp_path / "one")
    flip(tmp_path / "one/sparse.safetensors", (tmp_path / "one/sparse.safetensors").stat().st_size - 100, 3)
    with pytest.raises(ValueError):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert os.environ.get(switch) == before


class Forgetful(BitmaskQuantizer):
    """Leaves matrices packed that the model has no conversion for."""

    def update_weight_conversions(self, weight_conversions, model=None):
        return weight_conversions


def test_a_matrix_left_packed_is_an_error(llama, monkeypatch):
    """Even where the user allows other shapes, which transformers fills with random numbers."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, Forgetful)
    with pytest.raises(ValueError, match="are not in its files"):
        hf.AutoModelForCausalLM.from_pretrained(llama / "packed", ignore_mismatched_sizes=True)


def test_refusals_when_packing(llama, tmp_path):
    dense, packed = llama / "dense", llama / "packed"
    with pytest.raises(ValueError, match="packed already"):
        pack(packed, tmp_path / "x")
    with pytest.raises(ValueError, match="not packed by hf_sparsity"):
        unpack(dense, tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y/file").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        pack(dense, tmp_path / "y")
    shutil.rmtree(tmp_path / "y")
    assert pack(dense, packed) == packed, "it is there already"
    with pytest.raises(FileNotFoundError):
        pack(tmp_path, tmp_path / "x")
    model = tiny("llama")
    with pytest.raises(ValueError, match="no sparsity plan"):
        save_sparse(model, tmp_path / "x", layout="bitmask")
    with pytest.raises(ValueError, match="layout 'zip'"):
        save_sparse(model, tmp_path / "x", layout="zip")
    prune(model, make_plan(model, {"sparsity": 0.001, "pruner": "magnitude"}))
    with pytest.raises(ValueError, match="enough zeros"):
        save_sparse(model, tmp_path / "x", layout="bitmask")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        save_sparse(model, tmp_path / "x", layout="bitmask")
    assert list(tmp_path.iterdir()) == []


# ---- damage


def flip(path: Path, at: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def variants(folder: Path, rng: random.Random):
    """(name, damage, whether it must be an error) of 240 ways to damage a folder."""
    files = sorted(folder.glob("sparse-*.safetensors"))
    sizes = {f: f.stat().st_size for f in files}
    headers = {f: 8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files}
    config, index = folder / "config.json", folder / "sparse.safetensors.index.json"
    for k in range(60):
        file, bit = rng.choice(files), rng.randrange(8)
        at = rng.randrange(headers[file])
        yield f"header {k}", lambda f=file, at=at, bit=bit: flip(f, at, bit), True
        at = rng.randrange(headers[file], sizes[file])
        yield f"data {k}", lambda f=file, at=at, bit=bit: flip(f, at, bit), True
    for k in range(25):
        file = rng.choice(files)
        size = rng.randrange(sizes[file])
        yield f"cut {k}", lambda f=file, n=size: f.write_bytes(f.read_bytes()[:n]), True
        at, bit = rng.randrange(index.stat().st_size), rng.randrange(8)
        yield f"index {k}", lambda at=at, bit=bit: flip(index, at, bit), False
    start = config.read_text().index('"quantization_config"')
    stop = config.read_text().index("}", config.read_text().index('"files"'))
    for k in range(60):
        at, bit = rng.randrange(start, stop) if k % 2 else rng.randrange(config.stat().st_size), rng.randrange(8)
        yield f"config {k}", lambda at=at, bit=bit: flip(config, at, bit), False
    yield (
        "swapped",
        lambda: (files[0].rename(folder / "t"), files[1].rename(files[0]), (folder / "t").rename(files[1])),
        True,
    )
    yield "deleted", lambda: files[1].unlink(), True
    yield "index deleted", lambda: index.unlink(), True
    yield "index cut", lambda: index.write_text(index.read_text()[:300]), True
    yield "index with fewer files", lambda: _without_first_shard(index), True
    yield "config cut", lambda: config.write_text(config.read_text()[:-100]), True
    yield "empty file", lambda: files[0].write_bytes(b""), True
    yield "appended", lambda: files[0].write_bytes(files[0].read_bytes() + bytes(8)), True
    yield "zeros", lambda: files[0].write_bytes(bytes(sizes[files[0]])), True
    yield "no tie", lambda: _edit(config, tie_word_embeddings=True), False


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without_first_shard(index: Path) -> None:
    data = json.loads(index.read_text())
    first = min(data["weight_map"].values())
    data["weight_map"] = {k: v for k, v in data["weight_map"].items() if v != first}
    index.write_text(json.dumps(data))


def damages(part):
    """The numbers of a part's ways: a quarter of all, or a few of the random ones and each of a kind of its own."""
    return range(part, 240, 4) if part != "few" else [*range(0, 230, 15), *range(230, 240)]


@pytest.mark.parametrize("part", ["few", *(pytest.param(part, marks=pytest.mark.slow) for part in range(4))])
def test_240_ways_to_damage_a_folder(llama, tmp_path, part):
    """Each is an error, or loads the very values; so no bit of the files goes unchecked."""
    expected = load_all(llama / "dense")
    names = [name for name, _, _ in variants(llama / "packed", random.Random(0))]
    assert len(names) == 240
    refused = 0
    logging = hf.utils.logging
    logging.set_verbosity_error()
    for number in damages(part):
        name, folder = names[number], tmp_path / str(number)
        shutil.copytree(llama / "packed", folder)
        _, damage, must_fail = list(variants(folder, random.Random(0)))[number]
        damage()
        try:
            model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except Exception:
            refused += 1
        else:
            assert not must_fail, f"{name} went unnoticed"
            for key, value in model.state_dict().items():
                assert torch.equal(value, expected[key]), f"{name}: {key} is wrong"
        shutil.rmtree(folder)
    logging.set_verbosity_warning()
    assert refused > 0.75 * len(damages(part))


def load_all(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("spot", ["header", "packed", "dense"])
def test_damage_is_named(llama, tmp_path, spot):
    """By the file or the tensor, through transformers and through `unpack`."""
    shutil.copytree(llama / "one", tmp_path / "one")
    file = tmp_path / "one/sparse.safetensors"
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = {"packed": "model.layers.1.mlp.up_proj.weight", "dense": "model.norm.weight"}.get(spot)
    at = 100 if name is None else len(raw) - _data_size(header) + header[name]["data_offsets"][0] + 70
    flip(file, at, 3)
    for load in (hf.AutoModelForCausalLM.from_pretrained, lambda folder: unpack(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=name or "sparse.safetensors"):
            load(tmp_path / "one")
    assert not (tmp_path / "out").exists()


def _data_size(header):
    return max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")


# ---- hostile folders


def hostile(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    described, index = config["quantization_config"], folder / "sparse.safetensors.index.json"
    first = min(described["files"])
    if kind == "outside":
        shutil.copy(folder / first, folder.parent / first)
        data = json.loads(index.read_text())
        data["weight_map"] = {k: f"../{v}" if v == first else v for k, v in data["weight_map"].items()}
        index.write_text(json.dumps(data))
        described["files"][f"../{first}"] = described["files"].pop(first)
    elif kind == "weights file outside":
        described["weights_file"] = "../sparse.safetensors"
    elif kind == "index outside, config not":
        data = json.loads(index.read_text())
        shutil.copy(folder / first, folder.parent / first)
        data["weight_map"] = {k: f"../{v}" if v == first else v for k, v in data["weight_map"].items()}
        index.write_text(json.dumps(data))
    elif kind == "version":
        described["version"] = 2
    elif kind == "layout":
        described["layout"] = "torch.load"
    elif kind == "no files":
        described["files"] = {}
    elif kind == "10 GB index":
        with index.open("r+b") as stream:
            stream.truncate(10 * 2**30)
    elif kind == "10 GB header":
        (folder / first).write_bytes((10 * 2**30).to_bytes(8, "little") + b"{" * 100)
    elif kind == "wrong shape":
        state = load_file(folder / first)
        name = next(k for k, v in state.items() if v.dtype == torch.uint8)
        state[name] = codec.pack(torch.eye(3))
        checks = {k: codec.checksum(v) for k, v in state.items() if v.dtype != torch.uint8}
        save_file(state, folder / first, metadata={"format": "pt", packs.CHECKS: json.dumps(checks)})
        described["files"][first] = packs.header_digest(folder / first)
    (folder / "config.json").write_text(json.dumps(config))


KINDS = {
    "outside": "is not the name of a weight file",
    "weights file outside": "is not the name of packed weights",
    "index outside, config not": "the index names",
    "version": "version 2",
    "layout": "torch.load",
    "no files": "no list of its files",
    "10 GB index": "bytes",
    "10 GB header": "cut short",
    "wrong shape": "size mismatch|mismatched|not in its files",
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_folders(llama, tmp_path, kind):
    shutil.copytree(llama / "packed", tmp_path / "packed")
    hostile(tmp_path / "packed", kind)
    with pytest.raises((ValueError, RuntimeError), match=KINDS[kind]):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_hostile_dense_folder(llama, tmp_path):
    shutil.copytree(llama / "dense", tmp_path / "dense")
    index = tmp_path / "dense/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match="not the name of a weight file"):
        pack(tmp_path / "dense", tmp_path / "out")
    with index.open("r+b") as stream:
        stream.truncate(10 * 2**30)
    with pytest.raises(ValueError, match="is refused"):
        pack(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- importing is enough

ORDERS = [
    "import hf_sparsity; from transformers import AutoModelForCausalLM",
    "import transformers; import hf_sparsity; from transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import hf_sparsity",
]


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
def test_importing_the_package_is_enough(llama, imports):
    code = f"{imports}\nprint(type(AutoModelForCausalLM.from_pretrained({str(llama / 'packed')!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr[-2000:]
