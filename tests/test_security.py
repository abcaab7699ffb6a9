"""Hostile folders, made here: each is refused with a clear error, and nothing of them is imported, run or looked up."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparsity import Plan, make_plan, prune
from hf_sparsity.checkpoint import packed_folder as packs
from hf_sparsity.checkpoint.bitmask.codec import HEADER, checksum
from hf_sparsity.checkpoint.save import save_sparse
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.cli.main import main
from hf_sparsity.publish.layouts import pack, unpack
from tests.checkpoint.bitmask.packed_bytes import put, seal, string, tensor
from tests.conftest import tiny

HUGE = 10 * 2**30


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`dense` and `packed`, each in several files, with their reports."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny("llama", torch.bfloat16)
    report = prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    save_sparse(model, folder / "dense", report=report, max_shard_size="80KB")
    pack(folder / "dense", folder / "packed")
    return folder


@pytest.fixture
def copied(folders, tmp_path):
    def make(name):
        shutil.copytree(folders / name, tmp_path / "hostile")
        return tmp_path / "hostile"

    return make


def load(folder):
    hf.AutoModelForCausalLM.from_pretrained(folder)


def unpacked(folder):
    unpack(folder, folder.parent / "out")


def repacked(folder):
    pack(folder, folder.parent / "out")


def inspect(folder):
    """As `hf-sparsity inspect`, whose exit code 2 is a ValueError."""
    if main(["inspect", str(folder)]) == 2:
        raise ValueError("exit code 2")


def refused(folder, *verbs):
    """Each verb raises, briefly, and leaves nothing behind."""
    for verb in verbs:
        with pytest.raises((ValueError, OSError)) as caught:
            verb(folder)
        assert 0 < len(str(caught.value)) < 3000, verb
        assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["hostile"], verb


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def describe(folder, **changes):
    edit(folder / "config.json", lambda config: config["quantization_config"].update(changes))


def forge(folder, change, rename=None):
    """Changes the first packed matrix, with all checksums made right again, as only a forger would."""
    for file in sorted(folder.glob("sparse-*.safetensors")):
        state = load_file(file)
        name = next((name for name, value in state.items() if value.dtype == torch.uint8), None)
        if name is not None:
            break
    state[rename or name] = tensor(seal(change(string(state.pop(name)))))
    write(folder, file, state)


def write(folder, file, state):
    checks = {name: checksum(value) for name, value in state.items() if value.dtype != torch.uint8}
    save_file(state, file, metadata={"format": "pt", packs.CHECKS: json.dumps(checks)})
    files = json.loads((folder / "config.json").read_text())["quantization_config"]["files"]
    describe(folder, files=files | {file.name: packs.header_digest(file)})


# ---- packed weights that contradict themselves

WORDS = {
    "one bit more or fewer than values": lambda raw: put(raw, HEADER, bytes([raw[HEADER] ^ 1])),
    "shape of a terabyte": lambda raw: put(raw, 16, struct.pack("<2Q", 2**20, 2**20)),
    "shape beyond int64": lambda raw: put(raw, 16, struct.pack("<2Q", 2**40, 2**40)),
    "shape that wraps around": lambda raw: put(raw, 16, struct.pack("<2Q", 2**63 + 1, 2)),
    "values beyond the string": lambda raw: put(raw, 40, struct.pack("<Q", 2**61)),
    "no values at all": lambda raw: put(raw, 40, struct.pack("<Q", 0)),
    "another version": lambda raw: put(raw, 4, b"\2"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_forged_matrices(kind, copied):
    folder = copied("packed")
    forge(folder, WORDS[kind])
    refused(folder, load, unpacked)


# ---- files that are not what they should be


def first(folder):
    return min(folder.glob("*-00001-of-*.safetensors"))


def index(folder):
    return next(folder.glob("*.index.json"))


def point(folder, name):
    """The first shard goes by another name, in the index and in the config."""
    old = first(folder).name
    edit(
        index(folder),
        lambda data: data["weight_map"].update({k: name for k, v in data["weight_map"].items() if v == old}),
    )
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        files = json.loads((folder / "config.json").read_text())["quantization_config"]["files"]
        describe(folder, files={name if key == old else key: value for key, value in files.items()})


def grow(path):
    with path.open("r+b") as stream:
        stream.truncate(HUGE)


def twice(folder):
    """A tensor of the first shard stands in the second, too."""
    one, two = sorted(folder.glob("*-0000[12]-of-*.safetensors"))
    state = load_file(two) | dict(list(load_file(one).items())[:1])
    if two.name.startswith("sparse"):
        write(folder, two, state)
    else:
        save_file(state, two, metadata={"format": "pt"})


def replace_first(folder):
    file = first(folder)
    (folder.parent / "secret").write_bytes(b"secret" * 100)
    file.unlink()
    file.symlink_to(folder.parent / "secret")


def move_first_out(folder):
    """What lies elsewhere is good, so that nothing but its place is wrong."""
    file = first(folder)
    point(folder, f"../{file.name}")
    file.rename(folder.parent / file.name)


BOTH = {
    "index to a good file in the parent folder": move_first_out,
    "index to an absolute path": lambda f: point(f, str(f.parent / "elsewhere.safetensors")),
    "index to the parent folder": lambda f: point(f, f"../{first(f).name}"),
    "index to a folder inside": lambda f: point(f, f"sub/{first(f).name}"),
    "index to a name with a newline": lambda f: point(f, first(f).name + "\n"),
    "index to a pickle": lambda f: point(f, "pytorch_model-00001-of-00002.bin"),
    "index of 10 GB": lambda f: grow(index(f)),
    "index without a map": lambda f: index(f).write_text('{"weight_map": [1, 2]}'),
    "index nested too deep": lambda f: index(f).write_text("[" * 100_000),
    "link to a file elsewhere": replace_first,
    "header longer than the file": lambda f: first(f).write_bytes(HUGE.to_bytes(8, "little") + b"{" * 100),
    "header of 2^64 bytes": lambda f: first(f).write_bytes(b"\xff" * 8 + b"{}"),
    "file cut short": lambda f: first(f).write_bytes(first(f).read_bytes()[:-100]),
    "a tensor in two files": twice,
}


@pytest.mark.parametrize("kind", BOTH)
def test_hostile_files(kind, copied):
    """Dense folders are loaded by transformers, so for them it is `pack` that reads what is hostile."""
    folder = copied("packed")
    BOTH[kind](folder)
    refused(folder, load, unpacked)
    shutil.rmtree(folder)
    folder = copied("dense")
    BOTH[kind](folder)
    refused(folder, repacked)


DESCRIBED = {
    "another version": {"version": 2},
    "a version that is true": {"version": "1"},
    "another layout": {"layout": "pickle"},
    "a class path": {"quant_method": "builtins.eval"},
    "a method of somebody else": {"quant_method": "gptq", "bits": 4},
    "no files": {"files": {}},
    "files that are a list": {"files": ["sparse.safetensors"]},
    "files with a path": {"files": {"/etc/passwd": "0" * 64}},
    "weights elsewhere": {"weights_file": "/etc/passwd"},
    "weights in a pickle": {"weights_file": "pytorch_model.bin"},
}


@pytest.mark.parametrize(
    "name",
    ["sparse.safetensors\n", "sparse.safetensors/../x", "../sparse.safetensors", "model.safetensors", "sparse.bin", 3],
)
def test_weight_files_have_plain_names(name):
    with pytest.raises(ValueError, match="is not the name of a weight file"):
        packs.check_name(name, "sparse")


@pytest.mark.parametrize("kind", DESCRIBED)
def test_hostile_descriptions(kind, copied):
    folder = copied("packed")
    describe(folder, **DESCRIBED[kind])
    refused(folder, unpacked, repacked, *(() if "somebody" in kind else (load,)))


def test_attributes_cannot_be_set_from_the_config(copied):
    folder = copied("packed")
    describe(folder, to_dict="x", get_loading_attributes="x", dequantize=False, modules_to_not_convert=["lm_head"])
    load(folder)


# ---- plans and reports


def test_ten_gigabytes_of_json(copied, folders):
    folder = copied("packed")
    grow(folder / "config.json")
    refused(folder, unpacked, repacked, inspect, Plan.load)
    shutil.copy(folders / "packed/config.json", folder)
    grow(folder / REPORT_FILE)
    refused(folder, inspect)


PLANS = {
    "a million experts, ten times": lambda c: c.update(
        layers={f"x{i}.experts[0:900000]": {"sparsity": 0.5, "size": 8} for i in range(10)}
    ),
    "a number of 400 digits": lambda c: next(iter(c["layers"].values())).update(measure=10**400),
    "a size beyond int64": lambda c: next(iter(c["layers"].values())).update(size=2**63),
    "a sparsity that is text": lambda c: next(iter(c["layers"].values())).update(sparsity="__import__('os')"),
    "another version": lambda c: c.update(version=9),
    "layers that are a list": lambda c: c.update(layers=[1]),
}


@pytest.mark.parametrize("kind", PLANS)
def test_hostile_plans(kind, copied):
    folder = copied("dense")
    edit(folder / "config.json", lambda config: PLANS[kind](config["sparsity_config"]))
    refused(folder, Plan.load, inspect, repacked)


def test_an_algorithm_is_never_looked_up(copied):
    """A plan that names a class is refused where it would be needed, not imported."""
    folder = copied("dense")
    edit(
        folder / "config.json",
        lambda c: c["sparsity_config"]["config"].update(pruner="os.system", allocator="os:getcwd"),
    )
    with pytest.raises(ValueError, match=r"os.system|os:getcwd"):
        prune(tiny("llama", torch.bfloat16), Plan.load(folder))


# ---- nothing is run

WATCH = """
import json, os, sys
folder, root = sys.argv[1:3]
seen = []

def inside(path, where):
    return isinstance(path, (str, bytes)) and os.path.abspath(os.fsdecode(path)).startswith(where)

def hook(event, given):
    if event == "open" and inside(given[0], root):
        name = os.fsdecode(given[0])
        written = inside(name, os.path.join(root, ".out")) or inside(name, os.path.join(root, "out"))
        code = name.endswith((".py", ".pyc", ".bin", ".pkl", ".so")) and not copying
        if not written and (not inside(name, folder) or code):
            seen.append(f"open {name}")
    elif event == "exec" and inside(given[0].co_filename, root):
        seen.append(f"exec {given[0].co_filename}")
    elif event == "compile" and inside(given[1], root):
        seen.append(f"compile {given[1]}")
    elif event == "import" and (given[0].startswith("evil") or inside(given[1], root)):
        seen.append(f"import {given[0]}")
    elif event == "ctypes.dlopen" and inside(given[0], root):
        seen.append(f"dlopen {given[0]}")
    elif armed and event in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"):
        seen.append(event)

armed = copying = False
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder)
    told = "loaded without the package"
except (OSError, ValueError) as error:
    told = str(error)
import hf_sparsity
from hf_sparsity import Plan
from hf_sparsity.cli.main import main
from hf_sparsity.publish.layouts import pack, unpack

AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # what is imported on first use
sys.addaudithook(hook)
armed = True
AutoModelForCausalLM.from_pretrained(folder)
Plan.load(folder)
codes = [main(["inspect", folder, "--json"])]
copying = True  # everything beside the weights goes along unread
unpack(folder, os.path.join(root, "out"))
pack(os.path.join(root, "out"), os.path.join(root, "out2"))
print()
print(json.dumps({"told": told, "seen": seen, "codes": codes}))
"""


def test_nothing_in_a_folder_is_imported_or_run(copied, tmp_path):
    """A folder that is fine but for what lies beside its weights; watched by Python's own audit events."""
    folder = copied("packed")
    trap = tmp_path / "ran"
    code = f"open({str(trap)!r}, 'w')"

    class Evil:
        def __reduce__(self):
            return exec, (code,)

    for name in ("evil.py", "modeling_evil.py", "__init__.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    edit(
        folder / "config.json",
        lambda config: config.update(
            auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}, custom_pipelines={}
        ),
    )
    describe(folder, quantizer_class="evil.Quantizer", _target_="os.system")
    (tmp_path / "secret").write_text("secret")
    given = [sys.executable, "-c", WATCH, str(folder), str(tmp_path)]
    done = subprocess.run(given, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["seen"] == [] and result["codes"] == [0]
    assert "import hf_sparsity" in result["told"]  # stock transformers says what is needed
    assert not trap.exists()


def test_names_with_newlines_and_commands(copied):
    """They are only names: such a tensor belongs to nothing."""
    folder = copied("packed")
    forge(folder, lambda raw: raw, rename="model\n$(touch x).weight")
    refused(folder, load)


def test_what_is_tested_here_is_what_is_written(folders):
    with safe_open(first(folders / "packed"), framework="pt") as tensors:
        assert packs.CHECKS in tensors.metadata()
    load(folders / "packed")
    inspect(folders / "packed")
