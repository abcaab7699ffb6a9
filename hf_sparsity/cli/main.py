"""`hf-sparsity COMMAND`: the commands and their exit codes.

Exit code 0: done. 1: something failed on the way. 2: the input was wrong; nothing was started or written.
Each command is a file with `HELP`, `add_arguments(command)` and `run(options)`, which prints tables and returns what `--json`
prints. It imports what is heavy when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from .. import __version__
from ..files import MARKER

COMMANDS = (
    "plan",
    "race",
    "prune",
    "refit",
    "recover",
    "eval",
    "inspect",
    "verify",
    "bench",
    "card",
    "pack",
    "unpack",
    "push",
    "demo",
)
RESUMABLE = ("plan", "race", "prune", "refit", "recover")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` name, by default those of the process; returns the exit code."""
    return execute(build_parser().parse_args(arguments))


def execute(options: argparse.Namespace) -> int:
    """Runs the command that was parsed; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_sparsity.progress").setLevel(logging.INFO)  # a line now and then where there is no terminal
    try:
        with _ended_like_ctrl_c():
            return _run(options)
    except (ValueError, FileNotFoundError) as error:
        return _fail(options, error, 2)
    except (RuntimeError, OSError) as error:
        return _fail(options, error, 1)
    except KeyboardInterrupt:
        print(_interrupted(options), file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    if not sys.stderr.isatty():  # transformers' own bars, too, only where a person looks at a terminal
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    result = _module(options.command).run(options)
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    return 0 if result.get("ok", True) else 1


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM end the command as Ctrl-C does.

    A scheduler sends it before it stops a job, and a launcher when another of its processes has died.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupted(options: argparse.Namespace) -> str:
    """What is said after Ctrl-C: how to go on, if there is an unfinished run."""
    output = getattr(options, "output", None)
    for marker in (Path(output) / MARKER, Path(f"{output}.{MARKER}")) if output else ():
        if options.command in RESUMABLE and marker.is_dir():
            return f"interrupted; what is finished is safe in {marker}. Start the same command again to go on"
    return "interrupted; nothing was written"


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.json:
        print(json.dumps({"error": str(error)}))
    print(f"hf-sparsity: {error}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands and options."""
    parser = argparse.ArgumentParser(
        prog="hf-sparsity", description="Decide how sparse each layer of a language model should be, and prune it."
    )
    parser.add_argument("--version", action="version", version=f"hf_sparsity {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = _module(name)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        add_arguments(command, name)
    return parser


def add_arguments(command: argparse.ArgumentParser, name: str) -> None:
    """Adds the arguments of a command, and `--json`, which all commands have."""
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    _module(name).add_arguments(command)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f".{command}", __package__)


if __name__ == "__main__":
    sys.exit(main())
