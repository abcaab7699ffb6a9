"""`hf-sparsity recover`: train what pruning left, with every zero kept, into a new folder."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields
from typing import Any

from ..demo import NAME as DEMO
from ..recovery.methods import METHODS, MaskedLora, RecoveryMethod
from ..recovery.recipes import RECIPES, in_words, recipe
from .arguments import add_model_class, add_output, parse_algorithm, parse_source

HELP = "train what pruning left, every zero kept, into a new folder"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    command.add_argument("model", help="a sparse model's folder; for gradual and elsa a dense model's, or 'demo'")
    add_model_class(command)
    command.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="lora: masked adapters, merged at the end; full: all weights, the zeros held; reconstruct: the teacher is "
        "pruned again, each part trained towards the dense one; distill: all weights, or adapters with --rank, towards the "
        "teacher; gradual, elsa: a dense model becomes sparse while it trains (default: lora)",
    )
    _add_growth(command)
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
    command.add_argument("--rank", type=int, help=f"rank of the adapters (default: {MaskedLora.rank} for lora)")
    command.add_argument("--top-k", type=int, help="compare this many of the teacher's likeliest tokens only")
    command.add_argument(
        "--store", action="store_true", help="ask the teacher once and train from its stored answers; needs --top-k"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="decides the order of the data and the adapters' first values"
    )


def _add_growth(command: argparse.ArgumentParser) -> None:
    """Adds the recipes, and what a model is to become while it trains."""
    command.add_argument(
        "--recipe",
        type=int,
        choices=tuple(RECIPES),
        help="a method with all choices made, printed before it starts: 60 and 70 for a model pruned to these per cent, with "
        "--teacher; 80 and 90 for a dense one, which becomes sparse. Other options change it",
    )
    command.add_argument("--plan", metavar="FILE", help="of gradual and elsa: the plan to train to")
    command.add_argument("--sparsity", type=float, help="of gradual and elsa without --plan: the sparsity to train to")
    command.add_argument(
        "--allocator",
        default="uniform",
        metavar="NAME[:KEY=VALUE,...]",
        help="of gradual and elsa without --plan: how sparse each layer is (default: %(default)s)",
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

    method, teacher = _method(options), options.teacher
    if options.recipe is not None and RECIPES[options.recipe].starts_dense:
        teacher = teacher or options.model
    data, length = options.data, options.length
    if data is None and teacher != DEMO:
        raise ValueError("--data is missing: a local text, jsonl or parquet file, or a Hub dataset such as c4")
    if data is not None:
        sources = [Source(**parse_source(text)) for text in data]
        data = sources if len(sources) > 1 else sources[0].data
    else:
        data, length = [text for _, text in demo.texts("calibration")], length or demo.TRAINING_LENGTH
    if options.recipe is not None:
        print(in_words(options.recipe, method), file=sys.stderr if options.json else sys.stdout, flush=True)
    model = recover(
        demo.resolve(options.model),
        data,
        method,
        output_dir=options.output,
        teacher=demo.resolve(teacher),
        auto_class=options.model_class,
        length=length,
        **{name: getattr(options, name) for name in ("seed", "column", "split", "overwrite", "layout")},
    )
    record = dict(model.config.sparsity_config["recovered"])
    record["perplexity"] = {when: math.exp(loss) for when, loss in record["loss"].items()}
    if not options.json:
        print(summary(record))
        print(f"saved to {options.output}")
    return {"output": options.output, **record}


def _method(options: argparse.Namespace) -> RecoveryMethod:
    """Returns the method that the options describe, or the recipe as they change it."""
    if options.recipe is not None and options.method is not None:
        raise ValueError(f"--recipe {options.recipe} has a method of its own; leave --method out")
    kind = (
        METHODS[options.method or MaskedLora.name] if options.recipe is None else type(RECIPES[options.recipe].method)
    )
    chosen = {field.name: getattr(options, field.name) for field in fields(kind) if hasattr(options, field.name)}
    if chosen.get("rank", 0) is None:
        del chosen["rank"]
    grows = "plan" in chosen
    if (options.plan is not None or options.sparsity is not None) and not grows:
        raise ValueError(
            "--plan and --sparsity belong to the methods gradual and elsa, which make a dense model sparse"
        )
    if options.recipe is not None:
        defaults = {"batch": MaskedLora.batch, "accumulation": MaskedLora.accumulation, "store": False}
        changes = {name: value for name, value in chosen.items() if value is not None and value != defaults.get(name)}
        return recipe(options.recipe, **changes)
    if grows and options.plan is None and options.sparsity is not None:
        allocator = parse_algorithm(options.allocator)
        chosen["config"] = {"sparsity": options.sparsity, "allocator": allocator, "pruner": "magnitude"}
    return kind(**chosen)


def summary(record: dict[str, Any]) -> str:
    """Returns two lines about what was done; `record` as in the result of `run`."""
    steps = f"{record['steps']} steps, " if record["steps"] else ""
    before, after = record["perplexity"]["before"], record["perplexity"]["after"]
    sequences = record["data"]["heldout"]
    done = "sparse at the end" if record["method"] in ("gradual", "elsa") else "every zero kept"
    return (
        f"{record['method']}: {steps}{record['tokens']} tokens; {done}\n"
        f"perplexity on {sequences} held-out sequences of the data: {before:.2f} before, {after:.2f} after"
    )
