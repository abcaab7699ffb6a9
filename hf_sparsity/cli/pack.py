"""`hf-sparsity pack`: store a sparse folder small."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "store a sparse folder small: one bit per pruned weight and the values that are left"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    command.add_argument("folder", help="a sparse model's folder")
    command.add_argument("output", help="new or empty folder")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A dense folder into the bitmask layout."""
    from ..publish.layouts import pack

    return repacked(options, pack)


def repacked(options: argparse.Namespace, change: Callable[[str, str], Path]) -> dict[str, Any]:
    """Rewrites the folder, and says what it takes now."""
    from ..checkpoint.zeros import folder_bytes

    output = change(options.folder, options.output)
    before, after = folder_bytes(options.folder), folder_bytes(output)
    if not options.json:
        print(f"{output}: {after / 2**20:.1f} MiB of weights, {100 * after / before:.1f} % of {before / 2**20:.1f} MiB")
    return {"output": str(output), "bytes": after, "bytes_before": before}
