"""Fine-tune a pruned model in a loop of your own, zeros held: `hold_zeros`, here with accelerate.

    python examples/recover_with_accelerate.py

The embedded model is pruned to 70 % by magnitude and trained for 100 steps of 1024 tokens of the source it was trained
on; the held-out modules judge. Without accelerate the loop is the same: `loss.backward()` instead of
`accelerator.backward(loss)`.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import (
    SparsityConfig,
    demo,
    evaluate_text,
    hold_zeros,
    make_plan,
    measure_sparsity,
    prune,
    save_sparse,
    text_windows,
)

LENGTH, BATCH = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 windows of 128 tokens")
    parser.add_argument("--heldout", type=int, default=200, help="windows to judge by")
    parser.add_argument("--output", help="folder for the recovered model; by default it is not saved")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    model = AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    heldout = text_windows("".join(text for _, text in demo.texts("heldout")), tokenizer, LENGTH)[: args.heldout]
    rows = text_windows("".join(text for _, text in demo.texts("calibration")), tokenizer, LENGTH)
    rows = rows[torch.randperm(len(rows))[: args.steps * BATCH]]
    prune(model, make_plan(model, SparsityConfig(0.7, pruner="magnitude")))
    report("pruned", model, heldout)

    accelerator = Accelerator()
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
    prepared.train()
    with hold_zeros(prepared, optimizer):
        for ids in loader:
            accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    report("recovered", model, heldout)
    if args.output and accelerator.is_main_process:
        save_sparse(model, args.output, tokenizer=tokenizer)


def report(what: str, model: torch.nn.Module, heldout: torch.Tensor) -> None:
    perplexity = evaluate_text(model, heldout.to(model.device)).perplexity
    print(f"{what:10} sparsity {measure_sparsity(model).sparsity:.3f}   perplexity {perplexity:.2f}", flush=True)


if __name__ == "__main__":
    main()
