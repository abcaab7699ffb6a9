"""A small real language model, and the text it was trained and is judged on.

A 4-million-parameter Llama trained on the source of Python's standard library, so that every
job of this library can be tried offline, in seconds, on something that has learned something.
`examples/train_demo_model.py` trained it.

The text needs no download either: it is the standard library of the running Python. Which
modules are held out depends on their paths alone, so it is the same on every machine; how many
there are depends on the Python version (26 held out, 592 for calibration on Python 3.11).
"""

import hashlib
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "demo"  # what the command line calls it
PATH = str(Path(__file__).parent / "model")  # what `from_pretrained` takes; a folder of nothing but the model
LENGTH = 512  # tokens of a window of text that it is calibrated on and evaluated on
TRAINING_LENGTH = 128  # tokens of a sequence that it is trained on, so that a default run takes minutes

SPLITS = ("calibration", "heldout", "training")


def resolve(model: Any) -> Any:
    """Returns the embedded model's folder for its name on the command line, and what names another model as it is."""
    return PATH if model == NAME else model


def is_embedded(recorded: str) -> bool:
    """Returns whether a name that a plan recorded is the embedded model's, wherever the package lay when it was made."""
    parts = Path(recorded).parts
    inside = (("hf_sparsity", NAME), ("hf_sparsity", NAME, "model"))  # the first: before it had a folder of its own
    return recorded == NAME or any(parts[-len(end) :] == end for end in inside)


def texts(split: str) -> list[tuple[str, str]]:
    """Return the modules of a split, sorted by path: [(path in the library, source)].

    `heldout`: one module in twenty, never trained on. `calibration`: the other modules.
    `training`: those and the tests and codec tables, which are too uniform to judge by.
    """
    if split not in SPLITS:
        allowed = ", ".join(repr(name) for name in SPLITS)
        raise ValueError(f"unknown split {split!r}: choose one of {allowed}")
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [path for path in paths if _is_library(path) and split in _splits(path)]
    return [(path, (root / path).read_text("utf-8", errors="ignore")) for path in chosen]


def _is_library(path: str) -> bool:
    return not {"site-packages", "dist-packages", "__pycache__"} & set(PurePosixPath(path).parts)


def _splits(path: str) -> set[str]:
    """Return the splits a module belongs to."""
    parts = PurePosixPath(path).parts
    is_test = "test" in parts or "tests" in parts or parts[-1].startswith("test_")
    if is_test or parts[0] == "encodings":
        return {"training"}
    if int(hashlib.sha1(path.encode()).hexdigest(), 16) % 20 == 0:
        return {"heldout"}
    return {"calibration", "training"}
