"""The layering, read from the imports: what may know what, and what the package never does."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_sparsity"
TESTS = Path(__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
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
    ["validation.py"],
    ["files.py", "records.py", "progress.py", "demo"],
    ["core", "race_record.py"],
    ["plan.py", "algorithm.py"],
    ["allocators", "pruners", "model"],
    ["config.py", "distributed.py", "pictures"],
    ["calibration", "checkpoint"],
    ["runtime"],
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
TORCH = set(FLOOR) - {
    "validation.py",
    "files.py",
    "records.py",
    "race_record.py",
    "progress.py",
    "plan.py",
    "demo",
    "pictures",
    "__init__.py",
    "__main__.py",
}
KNOWS_HUGGING_FACE = {
    "model",
    "distributed.py",
    "calibration",
    "checkpoint",
    "runtime",
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
    "progress.py": {"tqdm"},
    **{part: {"numpy", "psutil", "lm_eval", *HUGGING_FACE} for part in KNOWS_HUGGING_FACE},
    "checkpoint/bitmask/kernels.py": {"llvmlite"},
    "runtime/kernels.py": {"llvmlite"},
    "runtime/emit.py": {"llvmlite"},
    "publish/card/render.py": {"jinja2", "markupsafe"},
    "pictures/pages.py": {"jinja2"},
}
# What only these files may import: a dotted name, and whoever may know it.
ONLY_IN = {
    "torch.distributed": {"core/shards.py", "distributed.py", "recovery/zero_masks.py"},
    "accelerate.hooks": {"model/offload.py", "checkpoint/streamed.py"},
    # modules of transformers that promise nothing to others
    "transformers.core_model_loading": {"checkpoint/transformers_internals.py"},
    "transformers.conversion_mapping": {"checkpoint/transformers_internals.py"},
    "transformers.modeling_utils": {"checkpoint/transformers_internals.py"},
    "transformers.quantizers": {"checkpoint/transformers_internals.py"},
    "transformers.dynamic_module_utils": {"checkpoint/transformers_internals.py"},
}
# The public verbs, whose keywords are the choices a user has; and one that carries them.
MANY_PARAMETERS = {
    "config.py __init__",  # SparsityConfig
    "calibration/calibration.py calibration_batches",
    "evaluation/evaluate.py evaluate",
    "evaluation/tasks.py score_tasks",
    "pruning/prune.py prune",
    "pruning/refit.py refit",
    "recovery/recover.py recover",
    "sparse_model.py from_pretrained",
    "streaming/stream.py stream_blocks",
}


def here(path: Path) -> str:
    """The path of a file or folder inside the package, as the lists above write it."""
    return path.relative_to(ROOT).as_posix()


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Absolute dotted names of all that a file imports anywhere: at the top, in functions, for type checkers."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    package = ["hf_sparsity", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(TREES[path]):
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
    assert found == {"algorithm.py", "core/allocation.py", "core/outliers.py", "validation.py"}
    assert {ours(n) for n in imports(ROOT / "config.py") if ".pruners" in n} == {ROOT / "pruners/__init__.py"}
    assert "torch.Tensor" in set(imports(ROOT / "core/masks.py"))
    assert {part(path) for path in FILES} == set(FLOOR), "a new part of the package needs a floor"


def offences(lines: Iterable[str]) -> str:
    """All that breaks a rule, one a line, so that one run of a test shows all of it."""
    return "\n".join(["", *lines])


def test_imports_point_down():
    upward = [
        f"{here(path)} imports {name}, which is not on a lower floor"
        for path in FILES
        for name, target in parts_imported(path)
        if part(target) != part(path) and FLOOR[part(target)] >= FLOOR[part(path)]
    ]
    assert not upward, offences(upward)


def test_no_file_imports_itself_by_a_detour():
    arrows = {path: {target for _, target in parts_imported(path)} - {path} for path in FILES}
    while arrows:
        leaves = {path for path, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"these import each other in a circle: {sorted(map(here, arrows))}"
        arrows = {path: targets for path, targets in arrows.items() if path not in leaves}


def test_nobody_imports_a_private_name():
    private = [
        f"{here(path)} imports {name}"
        for path in FILES
        for name, target in parts_imported(path)
        if target != path and any(p.startswith("_") and not p.startswith("__") for p in name.split("."))
    ]
    assert not private, offences(private)


def test_folders_are_introduced_by_one_docstring():
    for path in FILES:
        if path.name == "__init__.py" and here(path) not in (*TABLES, "demo/__init__.py"):
            only_docstring = ast.get_docstring(TREES[path]) and len(TREES[path].body) == 1
            assert only_docstring, f"{here(path)}: code belongs in a file that says what it is for"


def test_what_is_known_in_one_place_only():
    betrayed = [
        f"{here(path)} imports {name}"
        for path in FILES
        for name in imports(path)
        for secret, places in ONLY_IN.items()
        if here(path) not in places and f"{name}.".startswith(f"{secret}.")
    ]
    assert not betrayed, offences(betrayed)
    for secret, places in ONLY_IN.items():
        for place in places:
            names = imports(ROOT / place)
            assert any(f"{name}.".startswith(f"{secret}.") for name in names), f"{place} no longer imports {secret}"


def test_algorithms_do_not_know_each_other():
    for path in FILES:
        if part(path) in ("allocators", "pruners") and path.name != "__init__.py":
            siblings = [n for n in imports(path) if n.startswith(("hf_sparsity.allocators", "hf_sparsity.pruners"))]
            assert not siblings, f"{here(path)} imports {siblings}"


def test_what_comes_from_outside():
    for path in FILES:
        allowed = ({"torch"} if part(path) in TORCH else set()) | OTHERS.get(part(path), set()) | {"hf_sparsity"}
        allowed |= OTHERS.get(here(path), set())
        strangers = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - allowed
        assert not strangers, f"{here(path)} imports {strangers}"


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(file and name, definition) of every function, those inside classes and functions too."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{here(path)} {node.name}", node


def test_functions_stay_short():
    """At most 60 lines after the docstring; a function that defines others has theirs as well."""
    for path in FILES:
        for name, node in functions(path):
            body = node.body[bool(ast.get_docstring(node)) :] or node.body
            lines = node.end_lineno - body[0].lineno + 1
            assert lines <= 60, f"{name} has {lines} lines: cut it by what it does"


def test_functions_have_few_parameters():
    """At most 8, `self` apart: what belongs together is a dataclass. The public verbs are named above."""
    for path in FILES:
        for name, node in functions(path):
            given = node.args
            parameters = [
                *given.posonlyargs,
                *given.args,
                *given.kwonlyargs,
                *filter(None, (given.vararg, given.kwarg)),
            ]
            number = len(parameters) - (bool(given.args) and given.args[0].arg in ("self", "cls"))
            assert number <= 8 or name in MANY_PARAMETERS, f"{name} has {number} parameters"


def test_what_the_package_never_does():
    """Nothing is unpickled or evaluated, and only the command line prints."""
    never = ("torch.load", "torch.save", "eval", "exec", "pickle.load", "pickle.loads")
    done = [f"{here(p)} imports {n}" for p in FILES for n in imports(p) if n.split(".")[0] in PICKLES]
    for path in FILES:
        for node in ast.walk(TREES[path]):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else None
            if called in never or (called == "print" and part(path) != "cli"):
                done.append(f"{here(path)} line {node.lineno}: {called}")
    assert not done, offences(done)


def test_every_file_and_public_name_has_a_docstring():
    silent = [here(path) for path in FILES if not ast.get_docstring(TREES[path])]
    for path in FILES:
        for node in TREES[path].body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and len(node.body) > 3 and not ast.get_docstring(node):
                silent.append(f"{here(path)} {node.name}")
    assert not silent, offences(silent)


LEANING = re.compile(
    r"(Of|In|For|At|By|From|With|As|To|On|Which|Whether|Where|How|Who|Those|All|If|None|Per|And|Or|Not)\b"
)


def test_docstrings_stand_alone():
    """A first line is a sentence with a verb or a noun phrase; it does not lean on the name above it."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
            if text is None:
                continue
            where = f"{here(path)} {node.name}: {text.splitlines()[0]}"
            assert not LEANING.match(text), f"{where}: begin with a verb or a noun"
            assert len(text.split()) > 3, f"{where}: too short for a stranger"
            assert "so many" not in text, f"{where}: name the number"


def test_tests_stand_where_what_they_test_stands():
    """Every folder of the package has one of tests, and a folder of tests holds tests of a folder of the package."""
    ours = {here(path.parent) for path in FILES} - {".", "demo"}
    theirs = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")} - {"."}
    assert ours - theirs == set(), "these folders have no tests of their own"
    assert theirs - ours == set(), "these folders of tests are called like no folder of the package"


def test_tests_called_like_a_module_stand_in_its_folder():
    """`test_x.py` is where one looks for the tests of `x.py`; files about several modules have names of their own."""
    modules = {(here(path.parent), path.stem) for path in FILES} | {(".", path.parent.name) for path in FILES}
    misplaced = [
        f"tests/{path.relative_to(TESTS)}: the module of that name is in another folder"
        for path in TESTS.rglob("test_*.py")
        if (name := path.stem.removeprefix("test_")) in {stem for _, stem in modules}
        and (path.parent.relative_to(TESTS).as_posix(), name) not in modules
    ]
    assert not misplaced, offences(misplaced)


def test_contributing_lists_every_part_from_top_to_bottom():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    rows = [[name for part in re.findall(r"`([^`]+)`", cell) if (name := part.rstrip("/")) in FLOOR] for cell in cells]
    assert sorted(part for row in rows for part in row) == sorted(set(FLOOR) - {"__init__.py", "__main__.py"})
    for upper, lower in pairwise(rows):
        assert min(FLOOR[part] for part in upper) >= max(FLOOR[part] for part in lower), (upper, lower)
    targets = set(re.findall(r"^([\w-]+):", (ROOT.parent / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets


def test_tests_do_not_import_each_other():
    """What several files use is in `tests/tools.py`, in a `conftest.py` or in a file of the folder that holds no test."""
    borrowed = [
        f"{path.relative_to(TESTS)} line {node.lineno} imports from {node.module}"
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and ".test_" in f".{node.module}"
    ]
    assert not borrowed, offences(borrowed)


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
