"""`hf-sparsity eval`: what a model is worth."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_model

HELP = "perplexity on a text; with --against also KL divergence and top-1 agreement"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(command)
    command.add_argument(
        "--text",
        metavar="DATA",
        help="a local text, jsonl or parquet file, or a Hub dataset; default for 'demo' shapes: its held-out text",
    )
    command.add_argument("--split", default="test", help="of a Hub dataset (default: test)")
    command.add_argument("--column", help="of a dataset")
    command.add_argument("--against", metavar="MODEL", help="the dense model to compare with")
    command.add_argument("--length", type=int, help="tokens per window (default: 2048 or the model's limit)")
    command.add_argument("--windows", type=int, help="score only the first so many windows")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, and divergence from a second model."""
    from ..hf.calibration import read_texts
    from ..hf.evaluate import evaluate_text, windows
    from ..hf.model import default_length
    from . import tables
    from .loading import DEMO, DEMO_LENGTH, heldout_text, load

    if options.text is None and options.model != DEMO and options.against != DEMO:
        raise ValueError("--text is missing: a local text, jsonl or parquet file, or a Hub dataset")
    model, tokenizer = load(options)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so texts cannot be scored")
    length = options.length or (DEMO_LENGTH if options.text is None else default_length(model, tokenizer))
    text = (
        heldout_text()
        if options.text is None
        else "\n\n".join(read_texts(options.text, split=options.split, column=options.column))
    )
    ids = windows(text, tokenizer, length)[: options.windows]
    reference = None
    if options.against is not None:
        reference, _ = load(argparse.Namespace(**{**vars(options), "model": options.against}))
    quality = evaluate_text(model, ids, reference)
    if not options.json:
        print(tables.quality(quality, length))
    return {**vars(quality), "length": length}
