"""Train to 80 % sparsity with a teacher: `SparsityCallback` grows the zeros of a plan while the dense model teaches.

    python examples/train_to_80.py
    python examples/train_to_80.py --elsa                # pull towards a sparse copy, project near the end
    python examples/train_to_80.py --sparsity 0.9 --steps 1000

The embedded model is planned by a race of the allocators and trained on the source it was trained on; the held-out modules
judge. The same in one command: `hf-sparsity recover demo --recipe 80 --teacher demo --output sparse`.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_sparsity import (
    Elsa,
    Gradual,
    SparsityCallback,
    SparsityConfig,
    Teacher,
    calibration_batches,
    demo,
    evaluate_text,
    make_plan,
    measure_sparsity,
    text_windows,
)

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--elsa", action="store_true", help="ELSA instead of gradual pruning")
    parser.add_argument("--allocator", default="race", help="how sparse each layer will be")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 8 windows of 128 tokens")
    parser.add_argument("--heldout", type=int, default=200, help="windows to judge by")
    parser.add_argument("--output", help="folder for the sparse model; by default it is not saved")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    model, dense = (AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32) for _ in range(2))
    texts = [text for _, text in demo.texts("calibration")]
    heldout = text_windows("".join(text for _, text in demo.texts("heldout")), tokenizer, LENGTH)[: args.heldout]
    train = text_windows("".join(texts), tokenizer, LENGTH)
    report("dense", model, heldout)

    config = SparsityConfig(args.sparsity, allocator=args.allocator, pruner="magnitude")
    plan = make_plan(model, config, calibration_batches(texts, tokenizer, sequences=64, length=LENGTH))
    schedule = Elsa(penalty=0.03, interval=8, end=0.75) if args.elsa else Gradual(end=0.6, interval=5)
    callback = SparsityCallback(plan=plan, schedule=schedule, teacher=Teacher(dense, hard=0.5))

    chosen = train[torch.randint(len(train), (args.steps * 8,))]
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
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in chosen])
        callback.add_to(trainer)  # which puts the teacher into the trainer's loss
        trainer.train()
    report("trained", model, heldout)
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
