"""Speed of TRIM against the authors' code, matrix by matrix, on one random Llama block of width 1024.

    git clone https://github.com/flobk/TRIM DIR
    python tests/benchmarks/trim.py --authors DIR

Both sides get the same float32 weights, 256 input samples and sorted Wanda scores, in turn, in one process.
Prints milliseconds (medians) per matrix, the ratio of the searches, and how far the row sparsities differ.
The sort, which both sides need and which happens once outside the authors' function, is timed on its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from hf_sparsity.algorithm import Layer
from hf_sparsity.allocators.trim import TRIM
from hf_sparsity.core.stats import SAMPLES, InputStats

SHAPES = {  # outputs, inputs
    "q_proj": (1024, 1024),
    "k_proj": (512, 1024),
    "v_proj": (512, 1024),
    "o_proj": (1024, 1024),
    "gate_proj": (2816, 1024),
    "up_proj": (2816, 1024),
    "down_proj": (1024, 2816),
}
TARGET = 0.7
SETTINGS = SimpleNamespace(qmetric="cosim_flat", qmetric_dimwise="cosim", iterations=10, forbid_neg_lr=False)


def problem(name: str, *, samples: int) -> Layer:
    """Rows of different tails and inputs of different sizes, so that there is something to gain."""
    rows, width = SHAPES[name]
    generator = torch.Generator().manual_seed(sorted(SHAPES).index(name))
    tail = 0.5 + 1.5 * torch.rand(rows, 1, generator=generator)
    weight = torch.randn(rows, width, generator=generator)
    weight = weight.sign() * weight.abs() ** tail * 0.02
    stats = InputStats(frozenset({SAMPLES}))
    x = torch.randn(samples, width, generator=generator) * torch.rand(width, generator=generator).add(0.1)
    stats.add(x, sequences=samples, last=torch.arange(samples))
    return Layer(name, weight, stats=stats, scores=weight.abs() * x.norm(dim=0), sparsity=TARGET)


def authors(module: ModuleType, layer: Layer, order: torch.Tensor) -> torch.Tensor:
    """Their search, then the clamp and shift that their caller adds."""
    inputs = layer.stats.samples.T.contiguous()
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        x, _ = module.calculate_row_wise_sparsities(SETTINGS, TARGET, layer.weight, inputs, order, "cpu")
    x = x.clamp(0, 0.95)
    return x - x.mean() + TARGET


def ours(layer: Layer, order: torch.Tensor) -> torch.Tensor:
    trim = TRIM()
    return trim.restore(trim.search(layer.weight, layer.stats.samples.T.contiguous(), order, TARGET), TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", required=True, help="a clone of flobk/TRIM")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec = importlib.util.spec_from_file_location("authors_trim", Path(args.authors) / "lib" / "trim.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    print(f"trim, {args.threads} threads, {args.samples} samples, {args.repeat} runs; milliseconds")
    totals = torch.zeros(3)
    for name in SHAPES:
        layer = problem(name, samples=args.samples)
        seconds: list[list[float]] = [[], [], []]
        with torch.no_grad():
            for _ in range(args.repeat):
                order = timed(seconds[2], lambda at=layer: at.scores.argsort(dim=1, stable=True))
                theirs = timed(seconds[0], lambda at=layer, by=order: authors(module, at, by))
                mine = timed(seconds[1], lambda at=layer, by=order: ours(at, by))
        times = torch.tensor([statistics.median(s) * 1e3 for s in seconds])
        totals += times
        gap, spread = float((theirs - mine).abs().max()), float(mine.std())
        print(f"{line(name, times)}   rows differ by {gap:.1e} (std {spread:.3f})")
    print(line("all", totals))


def timed(seconds: list[float], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    start = time.perf_counter()
    result = run()
    seconds.append(time.perf_counter() - start)
    return result


def line(name: str, times: torch.Tensor) -> str:
    theirs, mine, sort = times.tolist()
    both = f"sort {sort:4.0f}, with it {(theirs + sort) / (mine + sort):4.1f}x"
    return f"{name:10} authors {theirs:6.0f}   ours {mine:5.0f}   {theirs / mine:5.1f}x   {both}"


if __name__ == "__main__":
    main()
