"""`hf-sparsity bench`: measures how fast a sparse model runs packed, against itself or its original dense."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import check_finished, read_json

HELP = "tokens a second and memory of a sparse model, packed in memory and dense in bf16 and float32, in turn"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    command.add_argument("folder", help="a sparse model's folder, packed or not")
    command.add_argument(
        "--against", metavar="DENSE", help="the dense model to compare with (default: FOLDER, unpacked)"
    )
    command.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default: %(default)s)")
    command.add_argument(
        "--tokens", type=int, default=32, help="tokens to decode with each batch (default: %(default)s)"
    )
    command.add_argument("--repeats", type=int, default=5, help="times the prompt is read (default: %(default)s)")
    command.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    command.add_argument(
        "--layers", action="store_true", help="also measure one product of each kind of layer, packed and dense"
    )
    command.add_argument("--no-record", action="store_true", help="do not keep the result in the folder")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the models, measures them in turn, prints a table, and keeps the result in the folder."""
    import torch

    from .. import demo
    from ..model.loading import load_model
    from ..publish.card.make_card import refresh
    from ..runtime.choose import layer_speeds, show_speeds
    from ..runtime.speed import PACKED, measure_speed, write_speed
    from ..sparse_model import SparseModel

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads}: at least 1 is needed")
        torch.set_num_threads(options.threads)
    check_finished(options.folder)
    read_json(Path(options.folder) / "config.json")  # raises for what is no model's folder: the result is kept there
    dense = demo.resolve(options.against) or options.folder
    models = {PACKED: SparseModel.from_pretrained(options.folder, dequantize=False, dtype="auto")}
    models |= {
        name: load_model(dense, dtype=dtype)
        for name, dtype in (
            ("dense bf16", torch.bfloat16),
            ("dense float32", torch.float32),
        )
    }
    speed = measure_speed(
        {name: model.eval() for name, model in models.items()},
        prompt=options.prompt,
        tokens=options.tokens,
        repeats=options.repeats,
        against=str(options.against or ""),
    )
    if not options.json:
        print(show(speed))
        if options.layers:
            print(show_speeds(layer_speeds(models[PACKED])))
    if not options.no_record:
        path = write_speed(options.folder, speed)
        refresh(options.folder)
        if not options.json:
            print(f"recorded in {path}")
    return speed


def show(speed: Mapping[str, Any]) -> str:
    """Returns the measurement as a table, and a line of how it was measured."""
    from .tables import render

    header = ["model", "MB in memory", "prefill", "first token", *(f"batch {n}" for n in ("1", "2", "4")), "GB/s read"]
    rows = [
        [
            name,
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['prefill']:.1f}",
            f"{1000 * row['first_token']:.0f} ms",
            *(f"{row['decode'][n]:.2f}" for n in ("1", "2", "4")),
            f"{row['read']:.1f}",
        ]
        for name, row in speed["models"].items()
    ]
    ratios, machine = speed["ratios"], speed["machine"]
    decode = ", ".join(f"{ratio:.2f} (batch {batch})" for batch, ratio in ratios["decode"].items())
    return "\n".join(
        [
            render(header, rows),
            f"packed against the faster dense: decoding {decode}, prefill {ratios['prefill']:.2f} times as fast; "
            f"{ratios['bytes']:.2f} times smaller than bf16",
            f"tokens a second, medians, in turn; {machine['cpu']}, {machine['threads']} threads, load {machine['load']}",
        ]
    )
