"""Supervised fine-tuning with TRL, zeros held: its trainers are Trainers, so one callback is all it takes.

    pip install trl
    python examples/recover_with_trl.py
    python examples/recover_with_trl.py --lora               # masked adapters instead of all weights

The embedded model is pruned to 70 % with Wanda and trained by `SFTTrainer` to write the body of a function after its
first line (a prompt, on which no loss is taken). Functions of the held-out modules judge: the loss on their bodies, as
a perplexity. Expected, in two to three minutes on two free cores:

    dense      perplexity 16.6
    pruned     perplexity 32.0, sparsity 0.698
    recovered  perplexity 20.3, sparsity 0.698 (all weights), 19.3 (--lora)
"""

from __future__ import annotations

import argparse
import ast
import math
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_sparsity import (
    SparsityCallback,
    SparsityConfig,
    calibration_batches,
    demo,
    make_plan,
    measure_sparsity,
    prune,
    sparse_lora,
)

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help="train masked adapters and merge them")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 functions")
    parser.add_argument("--heldout", type=int, default=200, help="functions to judge by")
    args = parser.parse_args()
    disable_progress_bars()
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    model = AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    texts = [text for _, text in demo.texts("calibration")]
    train = functions(texts).shuffle(seed=0).select(range(args.steps * 8))
    heldout = functions([text for _, text in demo.texts("heldout")]).shuffle(seed=0).select(range(args.heldout))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=args.steps,
            max_length=LENGTH,
            per_device_train_batch_size=8,
            learning_rate=6e-3 if args.lora else 1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            completion_only_loss=True,
            eos_token=tokenizer.eos_token,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
        )
        data: dict[str, Any] = {"train_dataset": train, "eval_dataset": heldout, "processing_class": tokenizer}
        judge = SFTTrainer(model, arguments, **data)
        report("dense", model, judge)
        batches = calibration_batches(texts, tokenizer, sequences=128, length=LENGTH)
        prune(model, make_plan(model, SparsityConfig(0.7, pruner="wanda"), batches), batches)
        report("pruned", model, judge)
        if args.lora:
            adapted = sparse_lora(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
            SFTTrainer(adapted, arguments, **data).train()
            adapted.merge_and_unload()
        else:
            SFTTrainer(model, arguments, **data, callbacks=[SparsityCallback()]).train()
        report("recovered", model, judge)
    print(f"{time.perf_counter() - start:.0f} s")


def functions(texts: list[str]) -> Dataset:
    """Every function of these modules: its `def` line as the prompt, its body as the completion."""
    found = []
    for text in texts:
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (body := node.body[0].lineno) > node.lineno:
                prompt, completion = lines[node.lineno - 1 : body - 1], lines[body - 1 : node.end_lineno]
                found.append({"prompt": "\n".join(prompt), "completion": "\n" + "\n".join(completion)})
    return Dataset.from_list(found)


def report(what: str, model: torch.nn.Module, judge: SFTTrainer) -> None:
    perplexity = math.exp(judge.evaluate()["eval_loss"])
    print(f"{what:10} sparsity {measure_sparsity(model).sparsity:.3f}   perplexity {perplexity:.2f}", flush=True)


if __name__ == "__main__":
    main()
