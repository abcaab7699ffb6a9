"""AlphaPruning and FARMS allocation against the authors' code, on the weights of a random Llama, on CPU.

    git clone https://github.com/haiquanlu/AlphaPruning /elsewhere/alphapruning
    git clone https://github.com/HUST-AI-HYZ/FARMS /elsewhere/farms
    python tests/benchmarks/spectra.py --alphapruning /elsewhere/alphapruning --farms /elsewhere/farms

Both sides get the same float32 matrices and the same threads, take turns within one run, and only the
medians are compared. The authors' modules are loaded from the given folders when this runs; unused
imports of theirs (weightwatcher) are replaced by empty modules. Nothing of theirs is in this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_sparsity.algorithm import Layer
from hf_sparsity.allocators.alpha import AlphaPruning
from hf_sparsity.allocators.farms import FARMS

Blocks = list[dict[str, torch.nn.Linear]]


def random_llama(width: int, ff: int, depth: int) -> Blocks:
    """The linear layers of `depth` Llama blocks with the initial weights of transformers (std 0.02)."""
    torch.manual_seed(0)
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    shapes |= {"gate_proj": (ff, width), "up_proj": (ff, width), "down_proj": (width, ff)}
    blocks: Blocks = [{n: torch.nn.Linear(s[1], s[0], bias=False) for n, s in shapes.items()} for _ in range(depth)]
    for layer in (layer for block in blocks for layer in block.values()):
        torch.nn.init.normal_(layer.weight, std=0.02)
    return blocks


def load_authors(folder: Path, module: str) -> types.ModuleType:
    """Imports `module` of the checked-out folder `folder` as part of a package of its own."""
    for unused in ("weightwatcher", "tqdm"):
        if unused not in sys.modules and importlib.util.find_spec(unused) is None:
            sys.modules[unused] = types.ModuleType(unused)
    package = types.ModuleType(f"authors_{module}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{module}")


def authors(estimate: Callable, blocks: Blocks, **settings: object) -> list[float]:
    """Their alphas, in model order."""
    net = torch.nn.ModuleList([torch.nn.ModuleDict(block) for block in blocks])
    with contextlib.redirect_stdout(io.StringIO()):
        return estimate(net, fix_fingers="xmin_peak", **settings)["alpha"]


def ours(allocator: AlphaPruning | FARMS, blocks: Blocks) -> list[float]:
    """Our alphas, in model order."""
    layers = [{n: Layer(n, layer.weight.detach()) for n, layer in block.items()} for block in blocks]
    return [alpha for block in layers for alpha in allocator.measure(block).values()]


def race(name: str, repeats: int, theirs: Callable[[], list], mine: Callable[[], list]) -> None:
    """Runs both in turns and prints medians in wall and CPU seconds, the ratios, and how the alphas differ."""
    seconds: dict[str, list[tuple[float, float]]] = {"theirs": [], "mine": []}
    alphas = {}
    for _ in range(repeats):
        for side, run in (("theirs", theirs), ("mine", mine)):
            wall, cpu = time.perf_counter(), time.process_time()
            alphas[side] = run()
            seconds[side].append((time.perf_counter() - wall, time.process_time() - cpu))
            print(f"  {name} {side}: wall {seconds[side][-1][0]:.2f} s, cpu {seconds[side][-1][1]:.2f} s", flush=True)
    (wall, cpu), (our_wall, our_cpu) = (
        [statistics.median(s) for s in zip(*runs, strict=True)] for runs in seconds.values()
    )
    off = sorted(abs(a - b) / abs(a) for a, b in zip(alphas["theirs"], alphas["mine"], strict=True))
    print(f"{name}: wall {wall:.2f} / {our_wall:.2f} s = {wall / our_wall:.1f}x, cpu {cpu / our_cpu:.1f}x")
    print(f"  alpha, relative difference: median {off[len(off) // 2]:.1e}, largest {off[-1]:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alphapruning", type=Path, help="checkout of haiquanlu/AlphaPruning")
    parser.add_argument("--farms", type=Path, help="checkout of HUST-AI-HYZ/FARMS")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ff", type=int, default=2816)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks = random_llama(args.width, args.ff, args.blocks)
    print(f"width {args.width}, ff {args.ff}, {args.blocks} blocks, {args.threads} threads, torch {torch.__version__}")
    if args.alphapruning:
        estimate = load_authors(args.alphapruning / "lib", "esd_utils").net_esd_estimator
        race("AlphaPruning", args.repeats, lambda: authors(estimate, blocks), lambda: ours(AlphaPruning(), blocks))
    if args.farms:
        estimate = load_authors(args.farms / "LLM_Pruning" / "lib", "esd_utils_farms").net_esd_estimator_farms
        settings = {"num_row_samples": 2000, "Q_ratio": 1.0, "sampling_ops_per_dim": 15}
        race("FARMS", args.repeats, lambda: authors(estimate, blocks, **settings), lambda: ours(FARMS(), blocks))


if __name__ == "__main__":
    main()
