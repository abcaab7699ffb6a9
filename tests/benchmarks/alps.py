"""CPU time of ALPS against the authors' code, and of ADMM-Grad against our SparseGPT, on one random Llama block (a minute).

    git clone https://github.com/mazumder-lab/ALPS DIR
    python tests/benchmarks/alps.py --authors DIR                     # 70 %
    python tests/benchmarks/alps.py --authors DIR --pattern 2:4
    python tests/benchmarks/alps.py                                   # without the authors' side

All sides prune the same weights from the same Gram matrices, in turn, in one process with one thread; ours prunes q/k/v
and gate/up together, as the library does. Prints CPU seconds (medians), the ratios, and the errors of the outputs. The
authors' code names the GPU in its text; here it runs on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparsity.algorithm import GRAM, Layer, Pattern
from hf_sparsity.core.stats import InputStats
from hf_sparsity.pruners import PRUNERS

AUTHORS = "authors' alps"
Groups = list[list[Layer]]  # layers of one group are fed by the same tensor


def groups(width: int, sparsity: float, pattern: Pattern) -> Groups:
    """Random inputs of 8 sequences of 512 tokens with uneven and correlated channels, and the layers that they feed."""
    generator = torch.Generator().manual_seed(0)
    wide = width * 11 // 4

    def group(columns: int, outputs: dict[str, int]) -> list[Layer]:
        x = torch.randn(4096, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.1)
        x = x + torch.randn(4096, 16, generator=generator) @ torch.randn(16, columns, generator=generator) / 4
        stats = InputStats(frozenset({GRAM}))
        stats.add(x, sequences=8)
        weights = {name: torch.randn(rows, columns, generator=generator) * 0.02 for name, rows in outputs.items()}
        return [Layer(n, w, stats, sparsity=sparsity, pattern=pattern) for n, w in weights.items()]

    return [
        group(width, {"q_proj": width, "k_proj": width // 2, "v_proj": width // 2}),
        group(width, {"o_proj": width}),
        group(width, {"gate_proj": wide, "up_proj": wide}),
        group(wide, {"down_proj": width}),
    ]


def authors_module(folder: Path) -> Any:
    """Returns the authors' module, its tensors placed on the CPU."""
    module = types.ModuleType("alps")
    text = (folder / "alps.py").read_text(encoding="utf-8").replace("'cuda:0'", "'cpu'")
    exec(compile(text, str(folder / "alps.py"), "exec"), module.__dict__)
    torch.cuda.synchronize = lambda *_: None
    return module


def authors(module: Any, given: Groups) -> dict[str, Tensor]:
    """Every layer on its own, as the authors' drivers do; the Gram matrix is consumed, hence the clone."""
    result = {}
    for layer in (layer for group in given for layer in group):
        linear = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
        linear.weight.data = layer.weight.clone()
        solver = module.ALPS_prune(linear, 8, 512)
        solver.XtX = layer.gram("alps").clone()
        kept, group = (layer.pattern.kept, layer.pattern.group) if layer.pattern.group else (0, 0)
        solver.ALPS_admm(sp=layer.sparsity, nm_n=kept, nm_m=group)
        result[layer.name] = linear.weight.data
    return result


def ours(pruner: str, given: Groups) -> dict[str, Tensor]:
    """What the library does with a block."""
    layers = [layer for group in given for layer in group]
    new = PRUNERS[pruner]().prune_together(layers)
    return {layer.name: weight for layer, weight in zip(layers, new, strict=True)}


def error(given: Groups, result: dict[str, Tensor]) -> float:
    """Mean relative squared error of the outputs."""
    layers = [layer for group in given for layer in group]
    energies = [
        layer.stats.energy(layer.weight - result[layer.name]) / layer.stats.energy(layer.weight) for layer in layers
    ]
    return statistics.mean(energies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, help="a clone of mazumder-lab/ALPS")
    parser.add_argument(
        "--width", type=int, default=128, help="of the block (default: %(default)s, as in the tests' model)"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--pattern", default="unstructured", help="or N:M, N kept, such as 2:4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pattern = Pattern.parse(options.pattern)
    given = groups(options.width, pattern.sparsity or options.sparsity, pattern)
    sides: dict[str, Callable[[], dict[str, Tensor]]] = {
        name: lambda name=name: ours(name, given) for name in ("alps", "admm", "sparsegpt")
    }
    if options.authors:
        module = authors_module(options.authors)
        sides = {AUTHORS: lambda: authors(module, given), **sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    with torch.no_grad():
        for _ in range(options.repeat):
            for name, run in sides.items():
                start = time.process_time()
                results[name] = run()
                seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    print(
        f"{pattern}, {given[0][0].sparsity:.0%}, width {options.width}, one thread, {options.repeat} runs, CPU seconds"
    )
    for name in sides:
        print(f"{name:14} {median[name]:7.2f} s   error {100 * error(given, results[name]):.4f} %")
    if options.authors:
        print(f"ALPS: {median['alps'] / median[AUTHORS]:.2f} of the authors' time")
    print(f"ADMM-Grad: {median['admm'] / median['sparsegpt']:.2f} times SparseGPT's")


if __name__ == "__main__":
    main()
