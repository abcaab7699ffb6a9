"""The layering, read from the imports: what may know what, and what the package never does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_sparsity"
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
HUGGING_FACE = {
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "optimum",
}

# A part imports parts on earlier lines, and itself; parts on one line never import each other.
FLOORS = [
    ["core", "files.py", "race_record.py", "demo"],
    ["plan.py", "algorithm.py"],
    ["allocators", "pruners", "model", "pictures"],
    ["config.py", "distributed.py"],
    ["calibration", "checkpoint"],
    ["streaming"],
    ["evaluation"],
    ["planning"],
    ["pruning", "publish"],
    ["recovery", "sparse_model.py"],
    ["__init__.py"],
    ["cli"],
    ["__main__.py"],
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
TABLES = ("__init__.py", "allocators/__init__.py", "pruners/__init__.py")  # the only ones that are not one docstring

# What each part may import from outside; every part may use the standard library.
TORCH = set(FLOOR) - {"files.py", "race_record.py", "plan.py", "demo", "pictures", "__init__.py", "__main__.py"}
KNOWS_HUGGING_FACE = {
    "model",
    "distributed.py",
    "calibration",
    "checkpoint",
    "streaming",
    "evaluation",
    "planning",
    "pruning",
    "publish",
    "recovery",
    "sparse_model.py",
    "cli",
}
OTHERS = {
    "pictures": {"matplotlib"},
    **{part: {"tqdm", "numpy", "psutil", "lm_eval", *HUGGING_FACE} for part in KNOWS_HUGGING_FACE},
    "checkpoint/bitmask/kernels.py": {"llvmlite"},
}
# What only these files may import: a dotted name, and whoever may know it.
ONLY_IN = {
    "torch.distributed": {"core/shards.py", "distributed.py", "recovery/zero_masks.py"},
    "accelerate.hooks": {"model/offload.py", "checkpoint/streamed.py"},
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of all that a file imports anywhere: at the top, in functions, for type checkers."""
    package = ["hf_sparsity", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(name: str) -> Path | None:
    """The file that a dotted name of this package stands in."""
    parts = name.split(".")[1:]
    while parts:
        path = ROOT.joinpath(*parts)
        if path.is_dir():
            return path / "__init__.py"
        if path.with_suffix(".py").exists():
            return path.with_suffix(".py")
        parts.pop()
    return ROOT / "__init__.py"


def parts_imported(path: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file of this package) for all that a file imports from this package."""
    return ((name, ours(name)) for name in imports(path) if name.split(".")[0] == "hf_sparsity")


def test_the_reader_of_imports_sees_relative_ones():
    """So that the tests below cannot pass for want of anything to judge."""
    found = {str(target.relative_to(ROOT)) for _, target in parts_imported(ROOT / "allocators/owl.py")}
    assert found == {"algorithm.py", "core/allocation.py", "core/outliers.py"}
    assert {ours(n) for n in imports(ROOT / "config.py") if ".pruners" in n} == {ROOT / "pruners/__init__.py"}
    assert "torch.Tensor" in set(imports(ROOT / "core/masks.py"))
    assert {part(path) for path in FILES} == set(FLOOR), "a new part of the package needs a floor"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down(path):
    for name, target in parts_imported(path):
        same = part(target) == part(path)
        assert same or FLOOR[part(target)] < FLOOR[part(path)], f"{path} imports {name}, which is not on a lower floor"


def test_no_file_imports_itself_by_a_detour():
    arrows = {path: {target for _, target in parts_imported(path)} - {path} for path in FILES}
    while arrows:
        leaves = {path for path, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"these import each other in a circle: {sorted(str(p.relative_to(ROOT)) for p in arrows)}"
        arrows = {path: targets for path, targets in arrows.items() if path not in leaves}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nobody_imports_a_private_name(path):
    for name, target in parts_imported(path):
        parts = [p for p in name.split(".") if p.startswith("_") and not p.startswith("__")]
        assert not parts or target == path, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_folders_are_introduced_by_one_docstring(path):
    name = path.relative_to(ROOT).as_posix()
    if path.name == "__init__.py" and name not in (*TABLES, "demo/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, "code belongs in a file that says what it is for"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_is_known_in_one_place_only(path):
    here = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        for secret, places in ONLY_IN.items():
            assert here in places or not f"{name}.".startswith(f"{secret}."), f"{here} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in ("allocators", "pruners")], ids=str)
def test_algorithms_do_not_know_each_other(path):
    if path.name == "__init__.py":
        return
    siblings = [n for n in imports(path) if n.startswith(("hf_sparsity.allocators", "hf_sparsity.pruners"))]
    assert siblings == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_comes_from_outside(path):
    allowed = ({"torch"} if part(path) in TORCH else set()) | OTHERS.get(part(path), set()) | {"hf_sparsity"}
    allowed |= OTHERS.get(path.relative_to(ROOT).as_posix(), set())
    strangers = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - allowed
    assert strangers == set(), f"{path} imports {strangers}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_the_package_never_does(path):
    """Nothing is unpickled or evaluated, and only the command line prints."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "eval", "exec", "pickle.load", "pickle.loads"), (
                f"line {node.lineno}"
            )
            assert called != "print" or part(path) == "cli", f"line {node.lineno}: print"
    assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_and_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "what is this file for?"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and len(node.body) > 3:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout.split())


HEAVY = {"torch", "numpy", "transformers", "datasets", "optimum", "accelerate", "peft", "matplotlib", "huggingface_hub"}


def test_importing_the_package_is_light():
    assert loaded_after("import hf_sparsity; dir(hf_sparsity); hf_sparsity.__version__") & HEAVY == set()


def test_reading_a_plan_needs_no_torch():
    assert loaded_after("from hf_sparsity import Plan, Report") & HEAVY == set()


def test_asking_for_a_config_needs_no_transformers():
    loaded = loaded_after("from hf_sparsity import SparsityConfig; SparsityConfig(0.5)")
    assert "torch" in loaded and loaded & {"transformers", "datasets", "accelerate", "peft", "optimum"} == set()


def test_every_public_name_is_there():
    import hf_sparsity

    for name in hf_sparsity.__all__:
        assert getattr(hf_sparsity, name) is not None
        assert name in dir(hf_sparsity)
    with pytest.raises(AttributeError, match="no attribute 'Recipe'"):
        _ = hf_sparsity.Recipe
