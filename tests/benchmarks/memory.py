"""Peak memory of `prune` beyond the model itself, at several depths: it grows with one block, not with depth.

    python tests/benchmarks/memory.py            # Wanda and SparseGPT, 4, 8 and 16 blocks; about two minutes
    python tests/benchmarks/memory.py --search   # of the search, in bytes a weight

Each case is a process of its own (Linux: `VmHWM` after the model is loaded and its peak reset). The search runs with
`MALLOC_MMAP_THRESHOLD_=262144`, so that glibc returns what is freed: otherwise it keeps gaps, and that many more the
longer a process runs (`--search 16` shows what it does by itself, for 16 blocks).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path


def peak(reset: bool = False) -> float:
    """Highest resident memory of this process since the last reset, MiB."""
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the model left on the heap is not counted
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def one(blocks: int, pruner: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_sparsity import SparsityConfig, make_plan, prune
    from hf_sparsity.pruners import PRUNERS

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1024, (8, 256))
    peaks: list[float] = []

    class Watched(PRUNERS[pruner]):
        """The pruner, noting the peak since its last call: one call a group of layers."""

        def prune_together(self, layers):
            pruned = super().prune_together(layers)
            peaks.append(peak() - before)
            peak(reset=True)
            return pruned

    plan = make_plan(model, SparsityConfig(0.5, pruner=pruner))
    model(ids[:1])  # what any forward pass needs is not counted
    peak(reset=True)
    before = peak()
    prune(model, plan, ids, pruner=Watched())
    calls = len(peaks) // blocks
    by_block = [max(peaks[i : i + calls]) for i in range(0, len(peaks), calls)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(
        f"{pruner:10s} {blocks:3d} blocks: model {weights:4.0f} MiB, one block {weights / blocks:3.0f}; above the model while "
        f"pruning the first two blocks {max(by_block[:2]):4.0f}, the last two {max(by_block[-2:]):4.0f}"
    )


def search(blocks: int) -> None:
    """A search of a few generations, bfloat16: beside the model one byte a weight, and what does not grow with depth."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_sparsity import SparsityConfig, make_plan
    from hf_sparsity.model.layers import find_layers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 1024, (16, 128))
    weights = sum(weight.size for weight in find_layers(model).weights.values())
    model(ids[:1])
    peak(reset=True)
    before = peak()
    options = {"name": "search", "budget": "60 evals", "candidates": ("owl", "dlp", "fisher")}
    make_plan(model, SparsityConfig(0.5, allocator=options), ids)
    above = peak() - before
    print(
        f"search     {blocks:3d} blocks: {weights / 2**20:.0f}M weights; above the model {above:.0f} MiB, "
        f"{above * 2**20 / weights:.2f} bytes a weight"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("BLOCKS", "PRUNER"), help=argparse.SUPPRESS)
    parser.add_argument("--search", nargs="?", type=int, const=0, metavar="BLOCKS", help="measure the search instead")
    options = parser.parse_args()
    if options.search:
        search(options.search)
        return
    if options.search == 0:
        environment = {"MALLOC_MMAP_THRESHOLD_": "262144", **os.environ}
        for blocks in (4, 8, 16, 32):
            subprocess.run([sys.executable, __file__, "--search", str(blocks)], check=True, env=environment)
        return
    if options.one:
        one(int(options.one[0]), options.one[1])
        return
    for pruner in ("wanda", "sparsegpt"):
        for blocks in (4, 8, 16):
            subprocess.run([sys.executable, __file__, "--one", str(blocks), pruner], check=True)


if __name__ == "__main__":
    main()
