"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..validation import COMPUTE_DTYPES

_MODEL = "a folder or Hub id; 'demo' is the small model inside the package"


def add_model(command: argparse.ArgumentParser) -> None:
    """Adds which model a command works on, and how it is loaded."""
    command.add_argument("model", help=_MODEL)
    add_loading(command)


def add_loading(command: argparse.ArgumentParser) -> None:
    """Adds how a model is loaded."""
    add_model_class(command)
    command.add_argument("--dtype", default="auto", help="type of the loaded weights (default: the checkpoint's)")
    command.add_argument("--device-map", metavar="MAP", help="as in transformers: 'auto', 'cpu', 'cuda:0'")
    command.add_argument(
        "--offload-folder", metavar="FOLDER", help="folder for the weights that --device-map puts on disk"
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub model")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model (off by default)"
    )


def add_model_class(command: argparse.ArgumentParser) -> None:
    """Adds by which class a model is opened."""
    command.add_argument(
        "--model-class",
        metavar="CLASS",
        help="class of transformers to open the model with, such as AutoModelForSequenceClassification (default: the one "
        "that its config.json names)",
    )


def add_config(command: argparse.ArgumentParser, *, allocator: bool = True) -> None:
    """Adds the fields of a `SparsityConfig`."""
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
        "--pruner",
        default="wanda",
        metavar="NAME[:KEY=VALUE,...]",
        help="which weights are removed (default: %(default)s)",
    )
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="leave these layers dense: names, module paths or globs; repeatable",
    )
    command.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PART",
        help="prune the vision or audio tower of a multimodal model too: 'vision', 'audio'; repeatable (default: the "
        "language model only)",
    )
    command.add_argument(
        "--refit",
        action="store_const",
        const=True,
        help="after pruning, set the weights that stay to their least-squares optimum on the calibration data",
    )
    add_refine(command)
    add_compute_dtype(command)
    command.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    command.add_argument(
        "--allow-unseen",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the prunable weights whose inputs the calibration text need not show (default: %(default)s)",
    )


def add_refine(command: argparse.ArgumentParser) -> None:
    """Adds what may improve the masks after the pruner."""
    command.add_argument(
        "--refine",
        choices=("swaps",),
        help="exchange kept and removed weights one for one within each row as long as that lowers the error of the "
        "layer's outputs on the calibration data; then refit",
    )


def add_layout(command: argparse.ArgumentParser) -> None:
    """Adds how the output's weights are stored."""
    command.add_argument(
        "--layout",
        choices=("dense", "bitmask"),
        default="dense",
        help="how zeros are stored: like other numbers, which loads everywhere, or as bits, which needs this package "
        "(default: %(default)s)",
    )


def add_stream(command: argparse.ArgumentParser) -> None:
    """Adds the option to read a model block by block, for models larger than memory."""
    command.add_argument(
        "--stream",
        action="store_true",
        help="for models larger than memory: read each block from disk when its turn comes, and write it at once",
    )


def add_compute_dtype(command: argparse.ArgumentParser) -> None:
    """Adds the precision of computing."""
    command.add_argument(
        "--compute-dtype",
        default="auto",
        choices=COMPUTE_DTYPES,
        help="precision of forward passes; weights stay as they are stored. auto: the model's own where the device has "
        "instructions for it, else float32, a block at a time (default: %(default)s)",
    )


def add_calibration(command: argparse.ArgumentParser) -> None:
    """Adds the calibration text, and how much of its hidden states may stay in memory."""
    add_text(command)
    command.add_argument(
        "--hidden-limit",
        type=float,
        metavar="GIB",
        help="hidden states of the calibration text to keep in memory; what exceeds them waits on disk (default: all)",
    )


def add_text(command: argparse.ArgumentParser) -> None:
    """Adds the calibration text."""
    command.add_argument(
        "--calibration",
        nargs="+",
        action="extend",
        metavar="DATA",
        help="a local file (text, jsonl, json, csv, tsv, parquet, also compressed), a pattern of files in quotes, a folder, "
        "a Hub dataset ('c4', 'wikitext2', 'name:configuration'), or 'self' for samples of the model; "
        "several are mixed: NAME=DATA@WEIGHT, both NAME= and @WEIGHT may be left out",
    )
    command.add_argument("--column", help="column of a dataset that holds the text; with several datasets, of each")
    command.add_argument(
        "--split",
        default="train",
        help="split of a folder or Hub dataset; 'train+validation' joins two (default: train)",
    )
    command.add_argument("--sequences", type=int, help="number of calibration sequences (default: 128)")
    command.add_argument("--length", type=int, help="tokens of each sequence (default: 2048 or the model's limit)")


def add_output(command: argparse.ArgumentParser) -> None:
    """Adds the output folder of a run that can be resumed: see `checkpoint/output.py`."""
    command.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="new or empty folder for the model; an interrupted run goes on when started again",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="start anew if the output holds an unfinished run or a sparse model"
    )


def add_plan_file(command: argparse.ArgumentParser) -> None:
    """Adds the file for a plan whose making can be resumed: see `checkpoint/plan_file.py`."""
    command.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="where the plan goes, JSON; an interrupted run goes on when started again",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the file, and an unfinished run for it")


def parse_algorithm(text: str | None) -> Any:
    """Turns `name:key=value,...` into `{"name": ..., ...}`; values are numbers, true, false, none or strings.

    Returns a name without a colon, or None, as it is. Raises ValueError for a part that is not `key=value`.
    """
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


def parse_source(text: str) -> dict[str, Any]:
    """Turns `[NAME=]DATA[@WEIGHT]` into fields of a `Source`: "data", and "name" and "weight" where they are given.

    Text that is the path of a file is that path, also with `=` or `@` in it. Raises ValueError for a weight that is no number.
    """
    readings = [{"data": text}]
    name, equals, rest = text.partition("=")
    readings += [{"data": rest, "name": name}] if equals and name and rest else []
    for reading in list(readings):
        data, at, weight = reading["data"].rpartition("@")
        readings += [reading | {"data": data, "weight": weight}] if at and data else []
    source: dict[str, Any] = next((reading for reading in readings if _exists(reading["data"])), readings[-1])
    if "weight" in source:
        number = _value(source["weight"])
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(
                f"--calibration {text}: {source['weight']!r} is no weight, and there is no file of that name; write DATA@0.5"
            )
        source["weight"] = number
    return source


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # the text is too long for a path
        return False


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
