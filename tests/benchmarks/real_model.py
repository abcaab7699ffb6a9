"""Pruners and allocators on a real model, SmolLM2-135M: held-out perplexity and divergence; docs/results.md reads its file.

    python examples/get_smollm2.py --output smollm2
    python tests/benchmarks/real_model.py --model smollm2 --calibration c4.json --heldout wikitext2.txt
    python tests/benchmarks/real_model.py ... --sparsity 0.6 --pruners alps --allocators owl race    # some of it
    python tests/benchmarks/real_model.py --table

`c4.json`: a JSON list of objects with `text`, or a jsonl file, of C4 documents. `wikitext2.txt`: the raw text. Weights are
held in float32. Each row is a plan and a pruning with `--sequences` x 512 tokens of C4, scored on the first `--windows`
windows of 512 tokens of the held-out text against the dense model. Rows that are in `--output` already are not run
again. Nothing is chosen by the held-out text. The weights are dequantized from 4 bits: compare within the table only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparsityConfig, calibration_batches, evaluate_text, make_plan, prune, text_windows

LENGTH = 512
OUTPUT = Path(__file__).parent / "results" / "real_model.json"
KEYS = ("target", "pattern", "pruner", "refit", "allocator", "seed", "sequences", "windows")


def texts(file: Path) -> list[str]:
    """Returns the documents of a JSON list or of JSON lines."""
    raw = file.read_text(encoding="utf-8")
    rows = json.loads(raw) if raw.lstrip().startswith("[") else [json.loads(line) for line in raw.splitlines()]
    return [row["text"] for row in rows]


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows that are asked for, the cheap ones first."""
    settings = [(s, "unstructured") for s in options.sparsity] + [(0.5, p) for p in options.patterns]
    rows = []
    grid = itertools.product(options.seeds, settings, options.refit, options.allocators, options.pruners)
    for seed, (target, pattern), refit, allocator, pruner in grid:
        if pattern == "unstructured" or allocator == "uniform":
            values = (target, pattern, pruner, refit, allocator, seed, options.sequences, options.windows)
            rows.append(dict(zip(KEYS, values, strict=True)))
    return rows


def run(case: dict[str, Any], options: argparse.Namespace, heldout: torch.Tensor, dense: Any) -> dict[str, Any]:
    """Plans, prunes and scores one row."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = calibration_batches(
        texts(options.calibration), tokenizer, sequences=case["sequences"], length=LENGTH, seed=case["seed"]
    )
    config = SparsityConfig(
        case["target"],
        pattern=case["pattern"],
        allocator=case["allocator"],
        pruner=case["pruner"],
        refit=case["refit"],
        seed=case["seed"],
    )
    start, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(model, config, ids)
    report = prune(model, plan, ids)
    seconds = {"wall": round(time.perf_counter() - start, 1), "cpu": round(time.process_time() - cpu, 1)}
    quality = evaluate_text(model, heldout, dense)
    return {
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "dense": quality.reference_perplexity,
        "sparsity": report.sparsity,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns Markdown: one line for each setting and allocator, one column for each pruner; perplexity and KL."""
    pruners = list(dict.fromkeys((r["pruner"], r["refit"]) for r in rows))
    lines = ["| sparsity | allocator | " + " | ".join(p + " + refit" * fit for p, fit in pruners) + " |"]
    lines.append("|---|---|" + "--:|" * len(pruners))
    for key in dict.fromkeys((r["target"], r["pattern"], r["allocator"]) for r in rows):
        cells = []
        for pruner in pruners:
            here = [
                r
                for r in rows
                if (r["target"], r["pattern"], r["allocator"], r["pruner"], r["refit"]) == (*key, *pruner)
            ]
            mean = {m: sum(r[m] for r in here) / len(here) for m in ("perplexity", "kl")} if here else None
            cells.append(f"{mean['perplexity']:.1f} ({mean['kl']:.2f})" if mean else "")
        name = f"{key[0]:.0%}".replace("%", " %") if key[1] == "unstructured" else key[1]
        lines.append(f"| {name} | {key[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("smollm2"))
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
    parser.add_argument("--pruners", nargs="+", default=["magnitude", "wanda", "sparsegpt", "admm", "alps"])
    parser.add_argument("--allocators", nargs="+", default=["uniform", "owl", "alphapruning", "fisher", "race"])
    parser.add_argument("--refit", action="append_const", const=True, help="with a refit after pruning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of what is in the output")
    options = parser.parse_args()
    options.refit = options.refit or [False]
    torch.set_num_threads(options.threads)
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    if options.table:
        print(table(rows))
        return
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    heldout = text_windows(options.heldout.read_text(encoding="utf-8"), tokenizer, LENGTH)[: options.windows]
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    finished = {tuple(r[k] for k in KEYS) for r in rows}
    for case in cases(options):
        if tuple(case.values()) in finished:
            continue
        rows.append(case | run(case, options, heldout, dense))
        options.output.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
        print(*case.values(), f"perplexity {rows[-1]['perplexity']:.2f}, KL {rows[-1]['kl']:.3f}", flush=True)


if __name__ == "__main__":
    main()
