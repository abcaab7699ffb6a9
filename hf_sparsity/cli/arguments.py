"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

_MODEL = "a folder or Hub id; 'demo' is the small model inside the package"


def add_model(command: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    command.add_argument("model", help=_MODEL)
    command.add_argument("--dtype", default="auto", help="of the loaded weights (default: the checkpoint's)")
    command.add_argument("--device-map", metavar="MAP", help="as in transformers: 'auto', 'cpu', 'cuda:0'")
    command.add_argument("--offload-folder", metavar="FOLDER", help="for weights that device-map puts on disk")
    command.add_argument("--revision", help="of a Hub model")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model (off by default)"
    )


def add_config(command: argparse.ArgumentParser, *, allocator: bool = True) -> None:
    """What a `SparsityConfig` says."""
    command.add_argument("--sparsity", type=float, help="fraction of weights to remove, in [0, 1)")
    command.add_argument(
        "--pattern", default="unstructured", help="unstructured, N:M (N kept of M), or *:M (default: %(default)s)"
    )
    if allocator:
        command.add_argument(
            "--allocator",
            default="uniform",
            metavar="NAME[:KEY=VALUE,...]",
            help="how sparse each layer is (default: %(default)s)",
        )
    command.add_argument("--row-allocator", metavar="NAME[:KEY=VALUE,...]", help="how sparse each row is")
    command.add_argument(
        "--pruner", default="wanda", metavar="NAME[:KEY=VALUE,...]", help="which weights go (default: %(default)s)"
    )
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="leave these layers dense: names, module paths or globs; repeatable",
    )
    command.add_argument("--seed", type=int, default=0)


def add_calibration(command: argparse.ArgumentParser) -> None:
    """The calibration text, and what may be held of it."""
    add_text(command)
    command.add_argument(
        "--hidden-limit",
        type=float,
        metavar="GIB",
        help="hidden states of the calibration text to keep in memory; what exceeds them waits on disk (default: all)",
    )


def add_text(command: argparse.ArgumentParser) -> None:
    """The calibration text."""
    command.add_argument(
        "--calibration",
        metavar="DATA",
        help="a local text, jsonl or parquet file, or a Hub dataset ('c4', 'wikitext2')",
    )
    command.add_argument("--column", help="of a dataset")
    command.add_argument("--sequences", type=int, help="number of calibration sequences (default: 128)")
    command.add_argument("--length", type=int, help="tokens of each (default: 2048 or the model's limit)")


def add_output(command: argparse.ArgumentParser) -> None:
    """A folder that is resumable: see `hf/output.py`."""
    command.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="new or empty folder for the model; an interrupted run goes on when started again",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="start anew if the output holds an unfinished run or a sparse model"
    )


def parse_algorithm(text: str | None) -> Any:
    """`name:key=value,...` -> `{"name": ..., ...}`; values are numbers, true, false, none or strings."""
    if text is None or ":" not in text:
        return text
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {"name": name}
    for pair in rest.split(","):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{text!r}: {pair!r} is not KEY=VALUE; write for example owl:outlier=7,spread=0.12")
        values[key.strip().replace("-", "_")] = _value(value.strip())
    return values


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
