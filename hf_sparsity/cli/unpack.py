"""The command `hf-sparsity unpack`: reverses `pack`."""

from __future__ import annotations

import argparse
from typing import Any

from .pack import add_arguments, repacked

__all__ = ["HELP", "add_arguments", "run"]

HELP = "make an ordinary checkpoint of a packed folder"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rewrites a packed folder in the dense layout."""
    from ..publish.layouts import unpack

    return repacked(options, unpack, "dense")
