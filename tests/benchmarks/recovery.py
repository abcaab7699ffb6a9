"""Ways back from 70 and 80 %: held-out perplexity of the embedded model after each, at equal tokens.

    python tests/benchmarks/recovery.py --output recovery.json              # about 2 hours on one core
    python tests/benchmarks/recovery.py --output recovery.json --part 1/2   # and 2/2 into another file, beside it
    python tests/benchmarks/recovery.py --only lora --only plain --seeds 0 --output some.json
    python tests/benchmarks/recovery.py --table recovery.json other.json    # markdown of all parts

Pruned with 128 sequences of 128 tokens of the calibration modules, by 70 % Wanda or 80 % SparseGPT. Then either the same
pruning with its blocks reconstructed on those sequences, in as many epochs as make the tokens equal; or a run of the
Trainer over other calibration modules: masked LoRA, all weights with `SparsityCallback`, and what people do today, a plain
LoRA that is masked when it is merged. `--only` also knows `lora-distilled` and `full-distilled`, with the dense model as
teacher. Judged on every second window of 128 tokens of the held-out modules, which no training has seen. The learning
rates are the defaults of `recover`; nothing was chosen on the held-out modules.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import (
    SparsityConfig,
    calibration_batches,
    demo,
    evaluate_text,
    make_plan,
    measure_sparsity,
    prune,
    text_windows,
)
from hf_sparsity.recovery.methods import MaskedLora
from hf_sparsity.recovery.preparation import prepare
from hf_sparsity.recovery.recover import recover
from hf_sparsity.recovery.training import make_trainer, training_arguments

LENGTH, BATCH, SEQUENCES, RANK = 128, 8, 128, 16
PRUNINGS = ((0.7, "wanda"), (0.8, "sparsegpt"))
METHODS = ("pruned", "reconstruct", "lora", "full", "plain")
MORE = ("lora-distilled", "full-distilled")
NAMES = {
    "pruned": "pruned",
    "reconstruct": "+ block reconstruction",
    "lora": "+ masked LoRA, merged",
    "full": "+ full fine-tuning",
    "plain": "+ plain LoRA, merged and masked",
    "lora-distilled": "+ masked LoRA, distilled",
    "full-distilled": "+ full fine-tuning, distilled",
}


class Bench:
    """The model, its texts and the held-out windows, read once."""

    def __init__(self, steps: int):
        self.steps = steps
        self.tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
        self.texts = [text for _, text in demo.texts("calibration")]
        heldout = "\n\n".join(text for _, text in demo.texts("heldout"))
        self.heldout = text_windows(heldout, self.tokenizer, LENGTH)[::2]

    def dense(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)

    def perplexity(self, model: Any) -> float:
        return evaluate_text(model, self.heldout).perplexity

    def run(self, sparsity: float, pruner: str, seed: int, method: str) -> dict[str, Any]:
        batches = calibration_batches(self.texts, self.tokenizer, sequences=SEQUENCES, length=LENGTH, seed=seed)
        model = self.dense()
        plan = make_plan(model, SparsityConfig(sparsity, pruner=pruner, seed=seed), batches)
        start, wall = time.process_time(), time.perf_counter()
        tokens = 0
        if method == "reconstruct":
            from hf_sparsity.pruning.reconstruction import BlockReconstruction

            epochs = max(1, round(self.steps * BATCH / SEQUENCES))
            tokens = epochs * SEQUENCES * LENGTH  # at most: halves stop early
            prune(model, plan, batches, reconstruct=BlockReconstruction(epochs=epochs))
        else:
            prune(model, plan, batches)
        if method not in ("pruned", "reconstruct"):
            tokens = self.steps * BATCH * LENGTH
            start, wall = time.process_time(), time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                model = self.train(model, method, seed, Path(folder))
        seconds = {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall}
        reached = measure_sparsity(model).sparsity
        return {"perplexity": self.perplexity(model), "sparsity": reached, "tokens": tokens, "seconds": seconds}

    def train(self, model: Any, method: str, seed: int, folder: Path) -> Any:
        kind, _, distilled = method.partition("-")
        if kind == "plain":
            return self.plain(model, seed, folder)
        return recover(
            model,
            self.texts,
            kind,
            output_dir=folder / "out",
            teacher=self.dense() if distilled else None,
            tokenizer=self.tokenizer,
            steps=self.steps,
            length=LENGTH,
            batch=BATCH,
            rank=RANK,
            seed=seed,
        )

    def plain(self, model: Any, seed: int, folder: Path) -> Any:
        """The same training on the same rows, with stock peft, masked when it is merged."""
        from peft import LoraConfig, get_peft_model

        from hf_sparsity.recovery.lora import merge_lora

        method = MaskedLora(steps=self.steps, batch=BATCH, rank=RANK, training={"save_strategy": "no"})
        where = {"teacher": None, "tokenizer": self.tokenizer, "length": LENGTH, "seed": seed}
        job = prepare(model, self.texts, method, **where, column=None, split="train")
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        adapted = get_peft_model(model, config)
        make_trainer(adapted, None, job.rows, job.method, training_arguments(job.method, seed, folder), []).train()
        return merge_lora(adapted).eval()


def table(results: list[dict[str, Any]]) -> str:
    """Rows: methods; for each pruning the mean perplexity, its range over the seeds, and the share of the gap closed.

    The share is of the loss in nats: `(pruned - recovered) / (pruned - dense)`.
    """
    dense = next(r["perplexity"] for r in results if r["method"] == "dense")
    cells: dict[tuple[float, str, str], dict[int, dict[str, Any]]] = {}
    for r in results:
        if r["method"] != "dense":
            cells.setdefault((r["target"], r["pruner"], r["method"]), {})[r["seed"]] = r
    columns = [c for c in PRUNINGS if any(key[:2] == c for key in cells)]
    lines = ["| | " + " | ".join(f"{100 * s:.0f} % {p} | gap closed" for s, p in columns) + " | CPU s |"]
    lines.append("|---|" + "--:|--:|" * len(columns) + "--:|")
    lines.append(f"| dense | {' | '.join(f'{dense:.2f} | ' for _ in columns)} | |")
    for method in (*METHODS, *MORE):
        row, cpu = [], []
        for s, p in columns:
            found, base = cells.get((s, p, method), {}), cells.get((s, p, "pruned"), {})
            values = [r["perplexity"] for r in found.values()]
            shares = [
                math.log(base[seed]["perplexity"] / r["perplexity"]) / math.log(base[seed]["perplexity"] / dense)
                for seed, r in found.items()
                if seed in base
            ]
            spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
            row.append(f"{100 * statistics.mean(shares):.0f} %" if shares and method != "pruned" else "")
            cpu += [r["seconds"]["cpu"] for r in found.values()]
        if cpu:
            lines.append(f"| {NAMES[method]} | {' | '.join(row)} | {statistics.mean(cpu):.0f} |")
    trained = sorted({r["tokens"] for r in results if r["tokens"]})
    seeds = sorted({r["seed"] for r in results if r["method"] != "dense"})
    lines.append(f"\nTokens: {', '.join(map(str, trained))}; seeds: {', '.join(map(str, seeds))}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("recovery.json"))
    parser.add_argument("--part", default="1/1", help="run only every n-th case: K/N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", action="append", choices=(*METHODS, *MORE), help="run this method only; repeatable")
    parser.add_argument("--pruning", choices=[p for _, p in PRUNINGS], help="run this column only")
    parser.add_argument("--steps", type=int, default=160, help="of 8 sequences of 128 tokens (default: 160)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", nargs="+", type=Path, help="print the markdown of these files instead")
    args = parser.parse_args()
    if args.table:
        print(table([r for file in args.table for r in json.loads(file.read_text())]))
        return
    torch.set_num_threads(args.threads)
    part, parts = map(int, args.part.split("/"))
    bench = Bench(args.steps)
    done = json.loads(args.output.read_text()) if args.output.exists() else []
    keys = ("target", "pruner", "seed", "method")
    finished = {tuple(r[k] for k in keys) for r in done}

    def add(case: tuple, result: dict[str, Any]) -> None:
        done.append(dict(zip(keys, case, strict=True)) | result)
        args.output.write_text(json.dumps(done, indent=1))
        print(*case, f"perplexity {result['perplexity']:.3f}, {result['seconds']['cpu']:.0f} CPU s", flush=True)

    if (0.0, "none", 0, "dense") not in finished:
        none = {"sparsity": 0.0, "tokens": 0, "seconds": {"cpu": 0.0, "wall": 0.0}}
        add((0.0, "none", 0, "dense"), {"perplexity": bench.perplexity(bench.dense()), **none})
    cases = [
        (*pruning, seed, method)
        for seed, pruning, method in itertools.product(args.seeds, PRUNINGS, args.only or METHODS)
        if args.pruning in (None, pruning[1])
    ]
    for case in cases[part - 1 :: parts]:
        if case not in finished:
            add(case, bench.run(*case))


if __name__ == "__main__":
    main()
