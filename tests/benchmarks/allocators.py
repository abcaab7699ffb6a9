"""Every allocator, the race and the search on the embedded model: held-out perplexity and divergence; the README's table.

    python tests/benchmarks/allocators.py --output all.json              # half a day on one core, most of it the searches
    python tests/benchmarks/allocators.py --output all.json --part 1/2   # and 2/2 into another file: one process a core
    python tests/benchmarks/allocators.py --sparsity 0.7 --allocators uniform owl race --seeds 0 --output some.json
    python tests/benchmarks/allocators.py --table all.json other.json --metric kl

For each sparsity, pruner, allocator and calibration seed: plan and prune with 32 x 512 tokens of the calibration
modules, then score every second window of 512 tokens of the held-out ones, against the dense model. Race and search choose on a
part of the same calibration tokens. The held-out modules are read once for each row and nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparsityConfig, calibration_batches, demo, evaluate_text, make_plan, prune, text_windows
from hf_sparsity.allocators import ALLOCATORS

LENGTH, SEQUENCES = 512, 32
CHOOSERS = ("race", "search")
NAMES = (*ALLOCATORS, "uniform+trim", *CHOOSERS)
KEYS = ("target", "pruner", "allocator", "seed")
# MSP searches: it gets what a user would wait for.
OPTIONS: dict[str, Any] = {"msp": {"name": "msp", "evaluations": 100}}


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.PATH)


def remembering(model: Any) -> Any:
    """The model, which runs each batch once: the dense one's logits are asked for by every row."""
    forward, known = model.forward, {}

    def recall(input_ids: torch.Tensor, **given: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in known:
            known[key] = forward(input_ids=input_ids, **given)
        return known[key]

    model.forward = recall
    return model


def measure(case: tuple[float, str, str, int], heldout: torch.Tensor, dense: Any, budget: str) -> dict[str, Any]:
    target, pruner, allocator, seed = case
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    texts = [text for _, text in demo.texts("calibration")]
    ids = calibration_batches(texts, tokenizer, sequences=SEQUENCES, length=LENGTH, seed=seed)
    name, _, row = allocator.partition("+")
    given = {"name": "search", "budget": budget} if name == "search" else OPTIONS.get(name, name)
    config = SparsityConfig(target, allocator=given, row_allocator=row or None, pruner=pruner, seed=seed)
    model = load()
    start, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(model, config, ids)
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    report = prune(model, plan, ids)
    quality = evaluate_text(model, heldout, dense)
    chosen = plan.chosen or {}
    return {
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "dense": quality.reference_perplexity,
        "sparsity": report.sparsity,
        "seconds": seconds,
        "winner": chosen.get("winner"),
        "spent": chosen.get("spent"),
        "certificate": chosen.get("certificate"),
    }


def table(results: list[dict[str, Any]], metric: str) -> str:
    """Rows: allocators; columns: sparsity and pruner; cells: mean and range over the seeds, if more than one; ▼ better than uniform."""

    def number(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.{3 if metric == 'kl' else 2}f}"

    cells: dict[tuple, list[float]] = {}
    for r in results:
        cells.setdefault((r["target"], r["pruner"], r["allocator"]), []).append(r[metric])
    columns = sorted({key[:2] for key in cells}, key=lambda c: (c[0], c[1] != "wanda"))
    lines = ["| allocator | " + " | ".join(f"{100 * s:.0f} % {p}" for s, p in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for name in (n for n in NAMES if any(key[2] == n for key in cells)):
        row = []
        for column in columns:
            values, uniform = cells.get((*column, name), []), cells.get((*column, "uniform"), [])
            mean = statistics.mean(values) if values else 0.0
            better = uniform and name != "uniform" and (" ▼" if mean < statistics.mean(uniform) else " ▲")
            span = f" ({number(min(values))}–{number(max(values))})" if len(values) > 1 else ""
            row.append(f"{number(mean)}{span}{better or ''}" if values else "")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    dense = statistics.mean(r["dense"] for r in results)
    return "\n".join([*lines, f"\nHeld-out {metric}; dense perplexity {dense:.2f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("allocators.json"))
    parser.add_argument("--part", default="1/1", help="run only every n-th case: K/N")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--allocators", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="10m", help="of the search (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", nargs="+", type=Path, help="print the markdown of these files instead")
    parser.add_argument("--metric", choices=("perplexity", "kl"), default="perplexity", help="of the table")
    options = parser.parse_args()
    if options.table:
        print(table([r for file in options.table for r in json.loads(file.read_text())], options.metric))
        return
    torch.set_num_threads(options.threads)
    part, parts = map(int, options.part.split("/"))
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    heldout = text_windows("\n\n".join(text for _, text in demo.texts("heldout")), tokenizer, LENGTH)[::2]
    done = json.loads(options.output.read_text()) if options.output.exists() else []
    finished = {tuple(r[k] for k in KEYS) for r in done}
    dense = remembering(load())
    cases = list(itertools.product(options.sparsity, options.pruners, options.allocators, options.seeds))
    for case in cases[part - 1 :: parts]:
        if case in finished:
            continue
        done.append(dict(zip(KEYS, case, strict=True)) | measure(case, heldout, dense, options.budget))
        options.output.write_text(json.dumps(done, indent=1))
        r = done[-1]
        print(*case, f"perplexity {r['perplexity']:.3f}, KL {r['kl']:.4f}, {r['seconds']['cpu']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
