"""`hf-sparsity recover`: train what pruning left, with every zero kept, into a new folder."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from typing import Any

from ..demo import NAME as DEMO
from ..recovery.methods import METHODS, MaskedLora
from .arguments import add_output, parse_source

HELP = "train what pruning left, every zero kept, into a new folder"
DEMO_LENGTH = 128  # tokens of a sequence for the embedded model, so that a default run takes minutes


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    command.add_argument("model", help="a sparse model's folder")
    command.add_argument(
        "--method",
        choices=tuple(METHODS),
        default=MaskedLora.name,
        help="lora: masked adapters, merged at the end; full: all weights, the zeros held; reconstruct: the teacher is "
        "pruned again, each part trained towards the dense one (default: %(default)s)",
    )
    command.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="DATA",
        help="a local text, jsonl or parquet file, or a Hub dataset; several are mixed, see --calibration of prune; default "
        "with '--teacher demo': its calibration text",
    )
    command.add_argument("--column", help="the dataset's column that has the texts")
    command.add_argument("--split", default="train", help="split of a folder or Hub dataset (default: %(default)s)")
    add_output(command)
    command.add_argument(
        "--layout", choices=("dense", "bitmask"), default="dense", help="see prune (default: %(default)s)"
    )
    command.add_argument(
        "--teacher", metavar="MODEL", help="the dense model to distil from: a folder or Hub id, or 'demo'"
    )
    command.add_argument("--steps", type=int, help=f"optimizer steps (default: {MaskedLora.default_steps})")
    command.add_argument("--tokens", type=int, help="tokens to train on, instead of --steps")
    command.add_argument("--length", type=int, help="tokens of a sequence (default: 2048 or the model's limit)")
    command.add_argument(
        "--batch", type=int, default=MaskedLora.batch, help="sequences of a step (default: %(default)s)"
    )
    command.add_argument(
        "--accumulation",
        type=int,
        default=MaskedLora.accumulation,
        help="parts that a batch is cut into to save memory (default: %(default)s)",
    )
    command.add_argument("--lr", type=float, help="largest learning rate (default: goes with 1 / width)")
    command.add_argument(
        "--rank", type=int, default=MaskedLora.rank, help="rank of the adapters (default: %(default)s)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="decides the order of the data and the adapters' first values"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the command; prints for people, or returns what `--json` prints.

    Raises:
        ValueError: no data, and everything that `recover` refuses.
        RuntimeError: a zero was lost, or no weight changed.
    """
    from .. import demo
    from ..calibration.mixture import Source
    from ..recovery.recover import recover

    data, length, teacher = options.data, options.length, options.teacher
    if data is None and teacher != DEMO:
        raise ValueError("--data is missing: a local text, jsonl or parquet file, or a Hub dataset such as c4")
    if data is not None:
        sources = [Source(**parse_source(text)) for text in data]
        data = sources if len(sources) > 1 else sources[0].data
    else:
        data, length = [text for _, text in demo.texts("calibration")], length or DEMO_LENGTH
    method = METHODS[options.method]
    chosen = {field.name: getattr(options, field.name) for field in fields(method) if hasattr(options, field.name)}
    model = recover(
        options.model,
        data,
        method(**chosen),
        output_dir=options.output,
        teacher=demo.PATH if teacher == DEMO else teacher,
        length=length,
        **{name: getattr(options, name) for name in ("seed", "column", "split", "overwrite", "layout")},
    )
    record = dict(model.config.sparsity_config["recovered"])
    record["perplexity"] = {when: math.exp(loss) for when, loss in record["loss"].items()}
    if not options.json:
        print(summary(record))
        print(f"saved to {options.output}")
    return {"output": options.output, **record}


def summary(record: dict[str, Any]) -> str:
    """Returns two lines about what was done; `record` as in the result of `run`."""
    steps = f"{record['steps']} steps, " if record["steps"] else ""
    before, after = record["perplexity"]["before"], record["perplexity"]["after"]
    sequences = record["data"]["heldout"]
    return (
        f"{record['method']}: {steps}{record['tokens']} tokens; every zero kept\n"
        f"perplexity on {sequences} held-out sequences of the data: {before:.2f} before, {after:.2f} after"
    )
