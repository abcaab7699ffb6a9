"""The command `hf-sparsity pack`: stores a sparse folder small."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "store a sparse folder small: one bit per pruned weight and the values that were kept"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    command.add_argument("folder", help="a sparse model's folder")
    command.add_argument("output", help="new or empty folder")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rewrites a dense folder in the bitmask layout."""
    from ..publish.layouts import pack

    return repacked(options, pack, "bitmask")


def repacked(options: argparse.Namespace, change: Callable[[str, str], Path], layout: str) -> dict[str, Any]:
    """Rewrites the folder by `change` into a layout, and prints and returns how large its weights are now and were before."""
    from ..checkpoint.zeros import folder_bytes
    from ..publish.layouts import is_done

    done = is_done(options.folder, options.output, layout)
    output = Path(options.output) if done else change(options.folder, options.output)
    before, after = folder_bytes(options.folder), folder_bytes(output)
    if done and not options.json:
        print(f"{output} is complete already, of the same folder; nothing was written")
    if not options.json:
        print(f"{output}: {after / 2**20:.1f} MiB of weights, {100 * after / before:.1f} % of {before / 2**20:.1f} MiB")
    return {"output": str(output), "bytes": after, "bytes_before": before}
