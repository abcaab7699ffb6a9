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

# Folder or file -> the parts of the package it may import; every part may use the standard library.
MAY_IMPORT = {
    "core": {"core"},
    "files.py": set(),
    "story.py": set(),
    "plan.py": {"files.py", "story.py"},
    "demo": set(),
    "pictures": {"files.py", "story.py", "plan.py", "pictures"},
    "algorithm.py": {"core"},
    "allocators": {"core", "algorithm.py"},
    "pruners": {"core", "algorithm.py"},
    "config.py": {"core", "algorithm.py", "allocators", "pruners"},
    "hf": {
        "core",
        "files.py",
        "story.py",
        "plan.py",
        "algorithm.py",
        "allocators",
        "pruners",
        "config.py",
        "pictures",
        "hf",
    },
    "cli": {
        "core",
        "files.py",
        "story.py",
        "plan.py",
        "algorithm.py",
        "allocators",
        "pruners",
        "config.py",
        "pictures",
        "hf",
        "cli",
        "demo",
        "__init__.py",
    },
    "__init__.py": {"plan.py", "algorithm.py", "config.py", "hf"},
    "__main__.py": {"cli"},
}
TORCH = {"core", "algorithm.py", "allocators", "pruners", "hf", "cli"}
OTHERS = {
    "pictures": {"matplotlib"},
    "hf": {"tqdm", "numpy", "psutil", "lm_eval", *HUGGING_FACE},
    "cli": {"tqdm", "numpy", *HUGGING_FACE},
    "core/compiled.py": {"llvmlite"},
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


def test_the_reader_of_imports_sees_relative_ones():
    """So that the tests below cannot pass for want of anything to judge."""
    found = {str(ours(n).relative_to(ROOT)) for n in imports(ROOT / "allocators/owl.py") if n.startswith("hf_sparsity")}
    assert found == {"algorithm.py", "core/importance.py", "core/outliers.py"}
    assert {ours(n) for n in imports(ROOT / "config.py") if ".pruners" in n} == {ROOT / "pruners/__init__.py"}
    assert "torch.Tensor" in set(imports(ROOT / "core/masks.py"))
    assert {part(path) for path in FILES} == set(MAY_IMPORT), "a new part of the package needs a place in the layering"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down(path):
    allowed = MAY_IMPORT[part(path)]
    for name in imports(path):
        if name.split(".")[0] != "hf_sparsity":
            continue
        target = ours(name)
        assert part(target) in allowed or (path.name == "__init__.py" and target.parent == path.parent), (
            f"{path} imports {name}"
        )


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in ("allocators", "pruners")], ids=str)
def test_algorithms_do_not_know_each_other(path):
    if path.name == "__init__.py":
        return
    siblings = [n for n in imports(path) if n.startswith(("hf_sparsity.allocators", "hf_sparsity.pruners"))]
    assert siblings == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_hf_and_cli_know_hugging_face(path):
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
