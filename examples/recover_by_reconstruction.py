"""Prune a model and train each half of each block, zeros held, to do what the dense one did: no labels, no Trainer.

    python examples/recover_by_reconstruction.py
    python examples/recover_by_reconstruction.py --pruner sparsegpt --sparsity 0.8

The embedded model is pruned with 32 windows of 512 tokens of the source it was trained on, once without and once with
reconstruction on the same windows; the held-out modules judge. A few minutes on one free core; expected:

    dense          perplexity 13.89
    pruned         perplexity 30.50, sparsity 0.70
    reconstructed  perplexity 17.58, sparsity 0.70

so that more than three quarters of what pruning cost are won back with the 16 384 tokens that pruning itself used.
"""

from __future__ import annotations

import argparse
import logging
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import (
    BlockReconstruction,
    SparsityConfig,
    calibration_batches,
    demo,
    evaluate_text,
    make_plan,
    measure_sparsity,
    prune,
    text_windows,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruner", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--sequences", type=int, default=32, help="calibration windows of --length tokens")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=BlockReconstruction.epochs)
    parser.add_argument("--every", type=int, default=4, help="judge by one in so many held-out windows")
    parser.add_argument("--output", help="folder for the recovered model; by default it is not saved")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_sparsity").setLevel(logging.INFO)  # one line for each half: its held-out error

    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    texts = [text for _, text in demo.texts("calibration")]
    batches = calibration_batches(texts, tokenizer, sequences=args.sequences, length=args.length)
    heldout = text_windows("\n\n".join(text for _, text in demo.texts("heldout")), tokenizer, args.length)[
        :: args.every
    ]
    config = SparsityConfig(args.sparsity, pruner=args.pruner)

    report("dense", load(), heldout)
    model = load()
    plan = make_plan(model, config, batches)
    prune(model, plan, batches)
    report("pruned", model, heldout)
    model = load()
    prune(
        model,
        plan,
        batches,
        reconstruct=BlockReconstruction(epochs=args.epochs),
        output_dir=args.output,
        tokenizer=tokenizer,
    )
    report("reconstructed", model, heldout)


def load() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)


def report(what: str, model: torch.nn.Module, heldout: torch.Tensor, start: float = time.perf_counter()) -> None:
    quality = evaluate_text(model, heldout.to(model.device))
    sparsity = measure_sparsity(model).sparsity
    seconds = time.perf_counter() - start
    print(f"{what:14} sparsity {sparsity:.3f}   perplexity {quality.perplexity:.2f}   {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
