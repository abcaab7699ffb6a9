"""How much allocation still gains once the pruner is good: allocators times pruners, with and without refit, on the embedded model.

    python tests/benchmarks/pruners.py                      # about an hour of one core; docs/results.md reads its file
    python tests/benchmarks/pruners.py --sparsity 0.6 --pruners alps --allocators uniform race

Float32. For each setting: plan and prune with `--sequences` x 512 tokens of the calibration modules, then score every eighth
window of 512 tokens of the held-out ones against the dense model. A plan does not depend on a refit and is made once.
Rows that are in `--output` already are not run again. Nothing is chosen by the held-out modules.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparsityConfig, calibration_batches, demo, evaluate_text, make_plan, prune, text_windows

LENGTH = 512
OUTPUT = Path(__file__).parent / "results" / "pruners.json"
ALLOCATORS = ("uniform", "owl", "alphapruning", "fisher", "race")
PRUNERS = ("wanda", "sparsegpt", "admm", "alps")
CHEAP = ("magnitude", "ria")  # with uniform layers only
FINISHES = ("none", "refit", "swaps")  # swaps with uniform layers only
KEYS = ("target", "pattern", "allocator", "pruner", "finish", "seed", "sequences")


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)


def cases(options: argparse.Namespace) -> Iterator[tuple[float, str, str, str]]:
    """(target, pattern, allocator, pruner), the cheap ones first; all finishes of one come together."""
    settings = [(s, "unstructured") for s in options.sparsity] + [(0.5, p) for p in options.patterns]
    for allocator in options.allocators:
        for target, pattern in settings:
            for pruner in (*options.pruners, *(CHEAP if allocator == "uniform" else ())):
                if pattern == "unstructured" or allocator == "uniform":
                    yield target, pattern, allocator, pruner


def finishes(allocator: str, pruner: str) -> tuple[str, ...]:
    """What is done after the pruner."""
    return FINISHES if allocator == "uniform" and pruner in ("magnitude", "wanda", "sparsegpt") else FINISHES[:2]


def config(case: tuple[float, str, str, str], finish: str, seed: int) -> SparsityConfig:
    target, pattern, allocator, pruner = case
    refine = "swaps" if finish == "swaps" else None
    return SparsityConfig(target, pattern, allocator, pruner=pruner, seed=seed, refit=finish != "none", refine=refine)


def measure(
    case: tuple[float, str, str, str], wanted: list[str], seed: int, sequences: int, judge: Judge
) -> Iterator[dict[str, Any]]:
    """The rows of one plan, one for each finish that is wanted."""
    ids = calibration_batches(judge.texts, judge.tokenizer, sequences=sequences, length=LENGTH, seed=seed)
    start = time.process_time()
    plan = make_plan(load(), config(case, "none", seed), ids)
    planning = time.process_time() - start
    for finish in wanted:
        model, start = load(), time.process_time()
        report = prune(model, replace(plan, config=config(case, finish, seed).to_dict()), ids)
        pruning = time.process_time() - start
        quality = evaluate_text(model, judge.heldout, judge.dense)
        yield {
            **dict(zip(KEYS, (*case, finish, seed, sequences), strict=True)),
            "perplexity": round(quality.perplexity, 4),
            "kl": round(quality.kl, 5),
            "dense": round(quality.reference_perplexity, 4),
            "sparsity": round(report.sparsity, 6),
            "winner": (plan.chosen or {}).get("winner"),
            "seconds": {"planning": round(planning, 1), "pruning": round(pruning, 1)},
        }


class Judge:
    """The texts, and the dense model, which runs each batch of the held-out text once."""

    def __init__(self, every: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
        self.texts = [text for _, text in demo.texts("calibration")]
        held = "\n\n".join(text for _, text in demo.texts("heldout"))
        self.heldout = text_windows(held, self.tokenizer, LENGTH)[::every]
        self.dense, known = load(), {}
        forward = self.dense.forward

        def recall(input_ids: torch.Tensor, **given: Any) -> Any:
            key = input_ids.numpy().tobytes()
            if key not in known:
                known[key] = forward(input_ids=input_ids, **given)
            return known[key]

        self.dense.forward = recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS))
    parser.add_argument("--pruners", nargs="+", default=list(PRUNERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--every", type=int, default=8, help="of the held-out windows, each how many-th is scored")
    parser.add_argument("--finishes", nargs="+", choices=FINISHES, default=list(FINISHES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    done, judge = {tuple(row[key] for key in KEYS) for row in record["rows"]}, Judge(options.every)
    for case in cases(options):
        for seed in options.seeds:
            wanted = [
                f
                for f in finishes(case[2], case[3])
                if f in options.finishes and (*case, f, seed, options.sequences) not in done
            ]
            for row in measure(case, wanted, seed, options.sequences, judge) if wanted else ():
                record["rows"].append(row)
                save(record, options.output)
                print(*(row[key] for key in KEYS), f"perplexity {row['perplexity']}, KL {row['kl']}", flush=True)


def save(record: dict[str, Any], file: Path) -> None:
    """Writes the file, one row a line."""
    head = {
        "command": "python tests/benchmarks/pruners.py",
        "model": "demo",
        "protocol": "float32; every eighth window of 512 tokens of the held-out modules; calibration of 512 tokens a sequence",
    }
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    file.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
