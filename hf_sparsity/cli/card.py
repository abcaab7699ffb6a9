"""`hf-sparsity card`: the model card of a sparse model's folder, and the picture of its plan."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "write a sparse model's card (README.md) and the picture of its plan into its folder"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    command.add_argument("folder", help="a sparse model's folder, dense or packed")
    command.add_argument(
        "--dense",
        metavar="MODEL",
        help="the dense model's folder or Hub id: licence, languages and data sets are taken from its card",
    )
    command.add_argument("--name", help="of the model, NAME or OWNER/NAME (default: made from what was done)")
    command.add_argument(
        "--base-model", metavar="ID", help="the dense model's Hub id (default: --dense, or as recorded)"
    )
    command.add_argument("--license", help="an identifier of the Hub's, such as apache-2.0")
    command.add_argument("--language", action="append", metavar="CODE", help="such as en; repeatable")
    command.add_argument("--dataset", action="append", metavar="ID", help="what the model was trained on; repeatable")
    command.add_argument("--overwrite", action="store_true", help="replace a README.md that is not ours")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Writes both files; what was given once need not be given again."""
    from importlib.util import find_spec
    from pathlib import Path

    from ..publish.card.make_card import CARD, PLOT, make_card

    card = make_card(
        options.folder,
        dense=options.dense,
        name=options.name,
        base_model=options.base_model,
        license=options.license,
        language=options.language,
        datasets=options.dataset,
        overwrite=options.overwrite,
    )
    folder, data = Path(options.folder), card.data
    plot = str(folder / PLOT) if f"]({PLOT})" in card.text else None
    evaluations = len(data.get("eval_results", ()))
    if not options.json:
        print(f"card written to {folder / CARD}" + (f", picture to {plot}" if plot else ""))
        if find_spec("matplotlib") is None:
            print("without a picture, which needs matplotlib: pip install 'hf_sparsity[plot]'")
        if data.get("license") is None:
            print("it names no licence: give --license, or --dense for the dense model's")
        if not evaluations:
            print("it has no results: run hf-sparsity eval on the folder first, with --against the dense model")
    return {
        "card": str(folder / CARD),
        "picture": plot,
        "license": data.get("license"),
        "base_model": data.get("base_model"),
        "results": evaluations,
    }
