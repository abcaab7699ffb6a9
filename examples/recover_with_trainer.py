"""Fine-tune a pruned model with its zeros held: `SparsityCallback` in an ordinary `Trainer`.

    python examples/recover_with_trainer.py
    python examples/recover_with_trainer.py --gradual        # prune while training instead of before

The embedded model is pruned to 70 % with Wanda and trained for 150 steps of 1024 tokens of the source it was trained
on; the held-out modules judge. Expected, in two to three minutes on two free cores:

    dense      perplexity 23.3
    pruned     perplexity 47.0, sparsity 0.698
    recovered  perplexity 31.2, sparsity 0.698

so that two thirds of what pruning cost are won back, and not a zero is lost.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_sparsity import (
    SparsityCallback,
    SparsityConfig,
    calibration_batches,
    demo,
    evaluate_text,
    make_plan,
    measure_sparsity,
    prune,
    text_windows,
)

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradual", action="store_true", help="introduce the zeros while training")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of 8 windows of 128 tokens")
    parser.add_argument("--heldout", type=int, default=200, help="windows to judge by")
    parser.add_argument("--output", help="folder for the recovered model; by default it is not saved")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    model = AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    heldout = text_windows("".join(text for _, text in demo.texts("heldout")), tokenizer, LENGTH)[: args.heldout]
    train = text_windows("".join(text for _, text in demo.texts("calibration")), tokenizer, LENGTH)
    report("dense", model, heldout)

    config = SparsityConfig(0.7, pruner="wanda")
    if args.gradual:
        callback = SparsityCallback(config, schedule="cubic", end=0.6, interval=5)
    else:
        batches = calibration_batches(
            [text for _, text in demo.texts("calibration")], tokenizer, sequences=128, length=LENGTH
        )
        prune(model, make_plan(model, config, batches), batches)
        report("pruned", model, heldout)
        callback = SparsityCallback()

    chosen = train[torch.randperm(len(train))[: args.steps * 8]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            use_cpu=not torch.cuda.is_available(),
        )
        data = [{"input_ids": row, "labels": row} for row in chosen]
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    report("recovered", model, heldout)
    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    print(f"{time.perf_counter() - start:.0f} s")


def report(what: str, model: torch.nn.Module, heldout: torch.Tensor) -> None:
    quality = evaluate_text(model, heldout.to(model.device))
    print(
        f"{what:10} sparsity {measure_sparsity(model).sparsity:.3f}   perplexity {quality.perplexity:.2f}", flush=True
    )


if __name__ == "__main__":
    main()
