"""What SparsityCallback costs per training step: the same Trainer with and without it, in turn, in one process.

    python tests/benchmarks/callback.py

A random Llama of 8 blocks of width 512 (27 million weights, 60 % of them 0), AdamW, 1024 tokens a step. Prints the
median step in milliseconds with and without, and their ratio over neighbouring runs; the aim is below 1.05. The work of
the callback depends on the weights only, that of a step on weights times tokens: more tokens make the share smaller.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.recovery import zero_masks
from hf_sparsity.recovery.callback import SparsityCallback


class Clock(TrainerCallback):
    """Seconds from the beginning of one step to that of the next, so that every callback is inside."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.at.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        """The first step, which makes the optimizer's state, is left out."""
        return [after - before for before, after in zip(self.at[1:], self.at[2:], strict=False)]


class Spent:
    """Seconds inside what holds zeros: on a noisy machine surer than the difference of two runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        zero_masks.ZeroMasks.apply = self.timed(zero_masks.ZeroMasks.apply)
        zero_masks.ParameterMask.mask_gradient = self.timed(zero_masks.ParameterMask.mask_gradient)

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            start = time.perf_counter()
            function(*args)
            self.seconds += time.perf_counter() - start

        return run


def build(width: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def run(model: LlamaForCausalLM, callbacks: list[TrainerCallback], tokens: int, steps: int, folder: str) -> list[float]:
    rows = torch.randint(0, 1024, (steps * tokens // 128, 128))
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=tokens // 128,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    clock = Clock()
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks, clock]).train()
    return clock.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args.width, args.blocks)
    prune(model, make_plan(model, SparsityConfig(0.6, pruner="magnitude")))
    grow = SparsityConfig(0.7, pruner="magnitude")
    kinds = {
        "without": list,
        "holding": lambda: [SparsityCallback()],
        "gradual": lambda: [SparsityCallback(grow, schedule="cubic", end=1.0, interval=1)],
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    spent, holding = Spent(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            medians = {}
            for kind, callbacks in kinds.items():
                fresh = build(args.width, args.blocks)
                fresh.load_state_dict(model.state_dict())
                fresh.config.sparsity_config = model.config.sparsity_config
                before = spent.seconds
                steps = run(fresh, callbacks(), args.tokens, args.steps, folder)
                holding += spent.seconds - before if kind == "holding" else 0.0
                times[kind] += steps
                medians[kind] = statistics.median(steps)
            for kind in kinds:
                ratios[kind].append(medians[kind] / medians["without"])
    print(f"{args.threads} threads, {args.tokens} tokens a step, {args.rounds} rounds of {args.steps} steps; medians")
    for kind in kinds:
        note = " (masks grow at every step: interval=10 costs a tenth of that)" if kind == "gradual" else ""
        middle, ratio = statistics.median(times[kind]) * 1e3, statistics.median(ratios[kind])
        print(f"{kind:8} {middle:7.0f} ms a step   x {ratio:.3f}{note}")
    each = holding / (args.rounds * args.steps)
    print(f"inside holding: {each * 1e3:.0f} ms a step, {100 * each / statistics.median(times['without']):.1f} % of it")


if __name__ == "__main__":
    main()
