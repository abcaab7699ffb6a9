"""Held-out perplexity of every allocator on the embedded model; makes the README's table.

    python tests/benchmarks/quality.py --output quality.json              # about 45 minutes on one core
    python tests/benchmarks/quality.py --output quality.json --part 1/2   # and 2/2 beside it: one process a core

For each sparsity, pruner, allocator and calibration seed: plan and prune with 32 x 512 tokens of the calibration
modules, then score every second window of 512 tokens of the held-out ones. Nothing is chosen here, so nothing is
selected on what is reported. `--table FILE...` prints the markdown of finished parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparsityConfig, calibration_batches, demo, evaluate_text, make_plan, prune
from hf_sparsity.hf.evaluate import windows

LENGTH = 512
SEQUENCES = 32
SEEDS = (0, 1, 2)
# The search is judged at a budget that a user would wait for: at most 100 candidates.
ALLOCATORS = {name: name for name in ("uniform", "owl", "alphapruning", "farms", "mrp")} | {
    "msp": {"name": "msp", "evaluations": 100}
}
RUNS = [
    (sparsity, pruner, allocator, row, seed)
    for sparsity, pruner, (allocator, row), seed in itertools.product(
        (0.6, 0.7), ("wanda", "sparsegpt"), [*((a, None) for a in ALLOCATORS), ("uniform", "trim")], SEEDS
    )
] + [(sparsity, "magnitude", "uniform", None, 0) for sparsity in (0.6, 0.7)]


def measure(sparsity: float, pruner: str, allocator: str, row: str | None, seed: int, heldout: torch.Tensor) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    texts = [text for _, text in demo.texts("calibration")]
    ids = calibration_batches(texts, tokenizer, sequences=SEQUENCES, length=LENGTH, seed=seed)
    config = SparsityConfig(sparsity, allocator=ALLOCATORS[allocator], row_allocator=row, pruner=pruner, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(demo.PATH)
    start = time.perf_counter()
    plan = make_plan(model, config, ids)
    report = prune(model, plan, ids)
    seconds = time.perf_counter() - start
    quality = evaluate_text(model, heldout)
    return {"perplexity": quality.perplexity, "tokens": quality.tokens, "sparsity": report.sparsity, "seconds": seconds}


def table(results: list[dict]) -> str:
    """Rows: allocators; columns: sparsity and pruner; cells: mean and range over the seeds."""
    cells: dict[tuple, list[float]] = {}
    for r in results:
        name = r["allocator"] + (f" + {r['row']}" if r["row"] else "")
        cells.setdefault((r["sparsity_target"], r["pruner"], name), []).append(r["perplexity"])
    columns = sorted({(s, p) for s, p, _ in cells if p != "magnitude"}, key=lambda c: (c[0], c[1] != "wanda"))
    lines = ["| allocator | " + " | ".join(f"{100 * s:.0f} % {p}" for s, p in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    names = list(dict.fromkeys(n for s, p, n in cells if p != "magnitude"))
    for name in names:
        row = []
        for sparsity, pruner in columns:
            values = cells[sparsity, pruner, name]
            uniform = statistics.mean(cells[sparsity, pruner, "uniform"])
            mean = statistics.mean(values)
            mark = "" if name == "uniform" else " ▼" if mean < uniform else " ▲"
            row.append(f"{mean:.2f} ({min(values):.2f}–{max(values):.2f}){mark}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    for sparsity in (0.6, 0.7):
        if values := cells.get((sparsity, "magnitude", "uniform")):
            lines.append(f"\nmagnitude, uniform, {100 * sparsity:.0f} %: {values[0]:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quality.json"))
    parser.add_argument("--part", default="1/1", help="run only every n-th case: K/N")
    parser.add_argument("--table", nargs="+", type=Path, help="print the markdown of these files instead")
    options = parser.parse_args()
    if options.table:
        print(table([r for file in options.table for r in json.loads(file.read_text())]))
        return
    part, parts = map(int, options.part.split("/"))
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    heldout = windows("\n\n".join(text for _, text in demo.texts("heldout")), tokenizer, LENGTH)[::2]
    done = json.loads(options.output.read_text()) if options.output.exists() else []
    keys = ("sparsity_target", "pruner", "allocator", "row", "seed")
    finished = {tuple(r[k] for k in keys) for r in done}
    for case in RUNS[part - 1 :: parts]:
        if case in finished:
            continue
        done.append(dict(zip(keys, case, strict=True)) | measure(*case, heldout))
        options.output.write_text(json.dumps(done, indent=1))
        print(*case, f"perplexity {done[-1]['perplexity']:.3f} in {done[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
