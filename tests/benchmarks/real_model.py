"""Allocators and pruners on a real model, SmolLM2-135M: held-out perplexity and divergence; README and docs/results.md read its file.

    python examples/get_smollm2.py --output smollm2
    python tests/benchmarks/real_model.py --model smollm2 --calibration c4_demo.json --heldout wikitext-2/valid.txt
    python tests/benchmarks/real_model.py ... --only 0.6 wanda            # cells with all of these words

`c4_demo.json`: a JSON list of objects with `text`, or a jsonl file, of C4 documents. Weights stay in bfloat16 and are
computed as `compute_dtype="auto"` says. Each cell is a plan and a pruning with `--sequences` x 512 tokens of C4, scored on
`--windows` windows of 512 tokens, evenly spread over the held-out text, each by itself; for each window its summed loss and
divergence from the dense model are kept, so that intervals and comparisons can be computed later. Cells that are in
`--output` already are not run again, so it can be stopped at any time. Nothing is chosen by the held-out text. **The weights
are dequantized from 4 bits**: compare within the table only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import (
    Allocator,
    BlockReconstruction,
    SparsityConfig,
    calibration_batches,
    make_plan,
    prune,
    text_windows,
)
from hf_sparsity.algorithm import Pattern
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.evaluation.divergence import DenseReference
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.precision import compute_dtype, computing
from hf_sparsity.planning.allocate import assign
from hf_sparsity.planning.measure import Measuring
from hf_sparsity.pruners import PRUNERS
from hf_sparsity.streaming.run import PassOptions

LENGTH = 512
OUTPUT = Path(__file__).parent / "results" / "real_model.json"
KEYS = ("target", "pattern", "pruner", "allocator", "recovery")


def cells() -> list[dict[str, Any]]:
    """Returns all cells, the most wanted first."""

    def some(targets: Any, pruners: Any, allocators: Any, recovery: str = "") -> list[dict[str, Any]]:
        grid = itertools.product(targets, pruners, allocators)
        return [dict(zip(KEYS, (t, "unstructured", p, a, recovery), strict=True)) for t, p, a in grid]

    main, others = ["uniform", "owl", "alphapruning"], ["fisher", "farms", "mrp"]
    found = some([0.6], ["wanda", "sparsegpt", "alps"], main) + some([0.5, 0.7], ["wanda", "sparsegpt", "alps"], main)
    found += some([0.5, 0.6, 0.7], ["magnitude", "ria"], ["uniform"]) + some([0.6], ["wanda", "sparsegpt"], others)
    found += some([0.6, 0.5, 0.7], ["wanda"], ["race"])
    found += [
        dict(zip(KEYS, (0.5, "2:4", p, "uniform", ""), strict=True))
        for p in ("magnitude", "wanda", "sparsegpt", "alps")
    ]
    return found + some([0.6, 0.5], ["wanda", "sparsegpt"], ["uniform", "alphapruning"], "reconstruction")


@dataclass(frozen=True)
class Given(Allocator):
    """An allocator that assigns what it was given."""

    sparsities: tuple[tuple[str, float], ...] = ()
    name = "given"

    def assign(self, measures, sizes, target, *, group=None, probe=None):
        """Returns the given sparsities."""
        return dict(self.sparsities)


class Bench:
    """The model, its dense weights, what was measured of them, and what the dense model predicts on the held-out text."""

    def __init__(self, options: argparse.Namespace):
        self.model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        documents = texts(options.calibration)
        self.ids = calibration_batches(documents, tokenizer, sequences=options.sequences, length=LENGTH, seed=0)
        windows = text_windows(options.heldout.read_text(encoding="utf-8"), tokenizer, LENGTH)
        windows = windows[:: max(1, len(windows) // options.windows)][: options.windows]
        self.layers = find_layers(self.model)
        self.dense = {name: weight.read().clone() for name, weight in self.layers.weights.items()}
        self.dtype = compute_dtype(self.model)
        self.measures: dict[str, Any] = {}
        with computing(self.model, self.dtype):
            batches = prepare_batches(self.model, [{"input_ids": row[None]} for row in windows])
            self.reference = DenseReference(self.model, self.layers, batches)

    def rows(self) -> list[list[float]]:
        """Returns (summed KL, summed loss, predictions) of each window for the model as it is now."""
        with computing(self.model, self.dtype):
            return [[round(number, 4) for number in row] for row in self.reference.rows()]

    def config(self, cell: dict[str, Any]) -> SparsityConfig:
        """Returns the config of a cell; what an allocator measures is measured once for all sparsities."""
        common = {"pattern": cell["pattern"], "pruner": cell["pruner"]}
        name = cell["allocator"]
        if name == "uniform":
            return SparsityConfig(cell["target"], **common)
        if name == "race":
            return SparsityConfig(cell["target"], allocator={"name": "race", "budget": "20m"}, **common)
        allocator, sizes = ALLOCATORS[name](), {n: w.size for n, w in self.layers.weights.items()}
        if name not in self.measures:
            data = prepare_batches(self.model, self.ids)
            made = Measuring(
                self.model, self.layers, data, allocator, PRUNERS["wanda"](), Pattern(), PassOptions(), None
            )
            with computing(self.model, self.dtype):
                self.measures[name] = made.first()
        sparsities = assign(
            allocator, self.measures[name], sizes, cell["target"], pattern=Pattern.parse(cell["pattern"]), oracle=None
        )
        return SparsityConfig(cell["target"], allocator=Given(tuple(sparsities.items())), **common)

    def run(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Plans, prunes and scores one cell; the model is dense before and after."""
        wall, cpu = time.perf_counter(), time.process_time()
        config = self.config(cell)
        recover = BlockReconstruction(lr=0.05) if cell["recovery"] == "reconstruction" else None
        plan = make_plan(self.model, config, self.ids)
        report = prune(self.model, plan, self.ids, reconstruct=recover)
        seconds = {"wall": round(time.perf_counter() - wall), "cpu": round(time.process_time() - cpu)}
        rows = self.rows()
        spent = {"tokens": plan.chosen["spent"]["tokens"]} if plan.chosen else {}
        for name, weight in self.layers.weights.items():
            weight.read().copy_(self.dense[name])
        return {"sparsity": report.sparsity, "seconds": seconds, **spent, "windows": rows}


def texts(file: Path) -> list[str]:
    """Returns the documents of a JSON list or of JSON lines."""
    raw = file.read_text(encoding="utf-8")
    rows = json.loads(raw) if raw.lstrip().startswith("[") else [json.loads(line) for line in raw.splitlines()]
    return [row["text"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("smollm2"))
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only cells that have all of these words")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    how = {"sequences": options.sequences, "length": LENGTH, "windows": options.windows}
    how |= {"calibration": "C4 documents", "heldout": f"{options.heldout.parent.name}, {options.heldout.name}"}
    made = json.loads(options.output.read_text()) if options.output.exists() else {"protocol": how, "cells": []}
    if made["protocol"] != how:
        raise SystemExit(f"{options.output} was made with {made['protocol']}, not {how}: give another --output")

    def keep(cell: dict[str, Any]) -> None:
        made["cells"].append(cell)
        lines = ",\n".join(json.dumps(one) for one in made["cells"])
        head = json.dumps(made["protocol"])
        options.output.write_text(f'{{"protocol": {head},\n"cells": [\n{lines}\n]}}\n')
        print(json.dumps({key: cell[key] for key in (*KEYS, "seconds") if key in cell}), flush=True)

    bench = Bench(options)
    finished = {tuple(cell.get(key) for key in KEYS) for cell in made["cells"]}
    if (0.0, "", "", "dense", "") not in finished:
        keep(dict(zip(KEYS, (0.0, "", "", "dense", ""), strict=True)) | {"windows": bench.rows()})
    for cell in cells():
        words = {str(value) for value in cell.values()}
        if tuple(cell.values()) not in finished and set(options.only) <= words:
            keep(cell | bench.run(cell))


if __name__ == "__main__":
    main()
