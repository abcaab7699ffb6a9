"""`hf-sparsity recover`: train what pruning left, with every zero kept, into a new folder."""

from __future__ import annotations

import argparse
import math
from typing import Any

from .arguments import add_output, parse_source

METHODS = ("lora", "full", "reconstruct")  # those of recovery/recover.py, which is too heavy to import for --help
HELP = "train what pruning left, every zero kept, into a new folder"
DEMO = "demo"
DEMO_LENGTH = 128  # tokens of a sequence for the embedded model, so that a default run takes minutes


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", help="a sparse model's folder")
    command.add_argument(
        "--method",
        choices=METHODS,
        default="lora",
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
    command.add_argument("--column", help="of a dataset")
    command.add_argument("--split", default="train", help="of a Hub dataset (default: %(default)s)")
    add_output(command)
    command.add_argument(
        "--layout", choices=("dense", "bitmask"), default="dense", help="see prune (default: %(default)s)"
    )
    command.add_argument(
        "--teacher", metavar="MODEL", help="the dense model, a folder or Hub id or 'demo': distil from it"
    )
    command.add_argument("--steps", type=int, help="optimizer steps (default: 200)")
    command.add_argument("--tokens", type=int, help="tokens to train on, instead of --steps")
    command.add_argument("--length", type=int, help="tokens of a sequence (default: 2048 or the model's limit)")
    command.add_argument("--batch", type=int, default=8, help="sequences of a step (default: %(default)s)")
    command.add_argument(
        "--accumulation",
        type=int,
        default=1,
        help="parts that a batch is cut into to save memory (default: %(default)s)",
    )
    command.add_argument("--lr", type=float, help="largest learning rate (default: goes with 1 / width)")
    command.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs it; prints for people, or returns what `--json` prints.

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
    names = ("steps", "tokens", "batch", "accumulation", "lr", "rank", "seed", "column", "split", "overwrite", "layout")
    model = recover(
        options.model,
        data,
        options.method,
        output_dir=options.output,
        teacher=demo.PATH if teacher == DEMO else teacher,
        length=length,
        **{name: getattr(options, name) for name in names},
    )
    done = dict(model.config.sparsity_config["recovered"])
    done["perplexity"] = {when: math.exp(loss) for when, loss in done["loss"].items()}
    if not options.json:
        print(summary(done))
        print(f"saved to {options.output}")
    return {"output": options.output, **done}


def summary(done: dict[str, Any]) -> str:
    """What was done, in two lines; `done` as in the result of `run`."""
    steps = f"{done['steps']} steps, " if done["steps"] else ""
    before, after = done["perplexity"]["before"], done["perplexity"]["after"]
    sequences = done["data"]["heldout"]
    return (
        f"{done['method']}: {steps}{done['tokens']} tokens; every zero kept\n"
        f"perplexity on {sequences} held-out sequences of the data: {before:.2f} before, {after:.2f} after"
    )
