"""`hf-sparsity plan | prune | eval | recover | inspect | pack | unpack | demo`: the arguments, and exit codes.

0: done. 1: it went wrong on the way. 2: the input was wrong; nothing was started or written.
Heavy imports happen when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import __version__
from .arguments import add_calibration, add_config, add_model, add_output
from .recover import add_recover_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with _ended_like_ctrl_c():
            return _run(options)
    except (ValueError, FileNotFoundError) as error:
        return _fail(options, error, 2)
    except (RuntimeError, OSError) as error:
        return _fail(options, error, 1)
    except KeyboardInterrupt:
        from . import commands

        print(commands.interrupted(options), file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from . import commands  # heavy: torch and transformers

    commands.set_up_progress()
    result = getattr(commands, options.command)(options)
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    return 0


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, a scheduler's notice and a launcher's when another of its processes died, ends a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.json:
        print(json.dumps({"error": str(error)}))
    print(f"hf-sparsity: {error}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(
        prog="hf-sparsity", description="Decide how sparse each layer of a language model should be, and prune it."
    )
    parser.add_argument("--version", action="version", version=f"hf_sparsity {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        return command

    plan = add("plan", "decide the sparsity of each layer and write the plan")
    add_model(plan)
    add_config(plan)
    add_calibration(plan)
    plan.add_argument("--output", required=True, metavar="FILE", help="where the plan goes, JSON")

    prune = add("prune", "prune a model, from a plan or in one go, and save it")
    add_model(prune)
    prune.add_argument(
        "--plan",
        metavar="FILE",
        help="carry out this plan (a JSON file or a sparse model's folder) instead of making one",
    )
    add_config(prune)
    add_calibration(prune)
    add_output(prune)
    prune.add_argument(
        "--stream",
        action="store_true",
        help="for models larger than memory: read each block from disk when its turn comes, and write it at once",
    )

    prune.add_argument(
        "--reconstruct",
        action="store_true",
        help="train each half-block's survivors against the dense model's, without labels; zeros are held",
    )

    add_recover_arguments(add("recover", "train what pruning left, every zero kept, into a new folder"))

    evaluate = add("eval", "perplexity on a text; with --against also KL divergence and top-1 agreement")
    add_model(evaluate)
    evaluate.add_argument(
        "--text",
        metavar="DATA",
        help="a local text, jsonl or parquet file, or a Hub dataset; default for 'demo' shapes: its held-out text",
    )
    evaluate.add_argument("--split", default="test", help="of a Hub dataset (default: test)")
    evaluate.add_argument("--column", help="of a dataset")
    evaluate.add_argument("--against", metavar="MODEL", help="the dense model to compare with")
    evaluate.add_argument("--length", type=int, help="tokens per window (default: 2048 or the model's limit)")
    evaluate.add_argument("--windows", type=int, help="score only the first so many windows")

    inspect = add("inspect", "table of a sparse model or plan: per block and projection, reached against planned")
    inspect.add_argument("path", help="a sparse model's folder, or a plan.json")

    for name, text in (
        ("pack", "store a sparse folder small: one bit per pruned weight and the values that are left"),
        ("unpack", "make an ordinary checkpoint of a packed folder"),
    ):
        command = add(name, text)
        command.add_argument("folder", help="a sparse model's folder")
        command.add_argument("output", help="new or empty folder")

    demo = add("demo", "prune the embedded model with every allocator, compare, save the best, draw it")
    demo.add_argument("--sparsity", type=float, default=0.6)
    demo.add_argument("--pruner", default="wanda", metavar="NAME[:KEY=VALUE,...]")
    demo.add_argument(
        "--output", default="hf_sparsity_demo", metavar="FOLDER", help="new or empty folder (default: %(default)s)"
    )
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
