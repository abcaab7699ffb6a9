"""Speed of SparseGPT against the authors' code, on one random Llama block of width 1024 (about two minutes).

    git clone https://github.com/IST-DASLab/sparsegpt DIR
    python tests/benchmarks/sparsegpt.py --authors DIR

Both sides prune the same weights from the same Hessians, in turn, in one process; ours prunes q/k/v and
gate/up together, as the library does. Prints seconds (medians), the ratio, and how far the results differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import time

import torch

from hf_sparsity.algorithm import Layer, Pattern
from hf_sparsity.pruners.sparsegpt import solve

# Layers fed by the same tensor: (inputs, {name: outputs}).
GROUPS = [
    (1024, {"q_proj": 1024, "k_proj": 512, "v_proj": 512}),
    (1024, {"o_proj": 1024}),
    (1024, {"gate_proj": 2816, "up_proj": 2816}),
    (2816, {"down_proj": 1024}),
]


def problem(sparsity: float, pattern: Pattern) -> list[tuple[torch.Tensor, list[Layer]]]:
    """Random Hessians of 8 sequences of 512 tokens with uneven channels, and the layers they belong to."""
    generator = torch.Generator().manual_seed(0)

    def group(width: int, outputs: dict[str, int]) -> tuple[torch.Tensor, list[Layer]]:
        x = torch.randn(4096, width, generator=generator) * torch.rand(width, generator=generator).add(0.1)
        x = x + torch.randn(4096, 16, generator=generator) @ torch.randn(16, width, generator=generator) / 4
        weights = {name: torch.randn(rows, width, generator=generator) * 0.02 for name, rows in outputs.items()}
        return 2 / 8 * x.T @ x, [Layer(n, w, sparsity=sparsity, pattern=pattern) for n, w in weights.items()]

    return [group(width, outputs) for width, outputs in GROUPS]


def authors(module: object, groups: list[tuple[torch.Tensor, list[Layer]]]) -> dict[str, torch.Tensor]:
    """Every layer on its own, as the authors' drivers do; the Hessian is consumed, hence the clone."""
    result = {}
    for hessian, layers in groups:
        for layer in layers:
            linear = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
            linear.weight.data = layer.weight
            solver = module.SparseGPT(linear)
            solver.H = hessian.clone()
            n, m = (layer.pattern.group - layer.pattern.kept, layer.pattern.group) if layer.pattern.group else (0, 0)
            with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
                solver.fasterprune(layer.sparsity, prunen=n, prunem=m)
            result[layer.name] = linear.weight.data
    return result


def ours(groups: list[tuple[torch.Tensor, list[Layer]]]) -> dict[str, torch.Tensor]:
    return {
        layer.name: weight
        for hessian, layers in groups
        for layer, weight in zip(layers, solve(layers, hessian), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", required=True, help="a clone of IST-DASLab/sparsegpt")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--pattern", default="unstructured", help="or N:M, N kept, such as 2:4")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.cuda.synchronize = lambda *_: None  # their timing line; this comparison runs on the CPU
    sys.path.insert(0, args.authors)
    module = importlib.import_module("sparsegpt")
    pattern = Pattern.parse(args.pattern)
    groups = problem(0.0 if pattern.group else args.sparsity, pattern)

    seconds: dict[str, list[float]] = {"authors": [], "ours": []}
    with torch.no_grad():
        for _ in range(args.repeat):
            for side, run in (("authors", lambda: authors(module, groups)), ("ours", lambda: ours(groups))):
                start = time.perf_counter()
                result = run()
                seconds[side].append(time.perf_counter() - start)
                if side == "authors":
                    reference = result
    bits = sum(int(((result[n] == 0) != (w == 0)).sum()) for n, w in reference.items())
    total = sum(w.numel() for w in reference.values())
    gap = max(float((result[n] - w).abs().max()) for n, w in reference.items())
    theirs, mine = (statistics.median(seconds[side]) for side in ("authors", "ours"))
    print(f"sparsegpt, {pattern}, {args.threads} threads, {args.repeat} runs")
    print(f"authors {theirs:.2f} s   ours {mine:.2f} s   {theirs / mine:.1f}x as fast")
    print(f"mask bits that differ: {bits} of {total}; largest difference of a weight: {gap:.1e}")


if __name__ == "__main__":
    main()
