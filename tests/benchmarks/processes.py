"""SparseGPT in two processes on two cores against one process on one core.

    python tests/benchmarks/processes.py

A random Llama of width 1024, feed-forward 2816, 4 blocks, 32 x 512 tokens, pruned into a folder by the command line's
own road (`make_plan`, `prune`), each process with one thread. Both sides in turn; seconds are medians of the pruning
alone, without imports and loading, and the ratio is two processes' over one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def save(folder: Path, blocks: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def one(folder: Path) -> None:
    """Prunes in memory; the main process prints the seconds."""
    from transformers import AutoModelForCausalLM

    from hf_sparsity import SparsityConfig, make_plan, prune
    from hf_sparsity.distributed import Processes

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 4096, (32, 512), generator=torch.Generator().manual_seed(1))
    processes = Processes.current()
    plan = make_plan(model, SparsityConfig(0.5, pruner="sparsegpt"))
    processes.wait()
    start = time.perf_counter()
    prune(model, plan, ids)
    processes.wait()
    if processes.main:
        print(json.dumps({"seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), options.blocks)
        alone = [sys.executable, __file__, "--one", folder]
        both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:]]
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(options.repeats):
            for name, command in (("one", alone), ("two", both)):
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
                seconds[name].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name} process{'es' if name == 'two' else ''}: {medians[name]:.1f} s ({', '.join(f'{v:.1f}' for v in values)})"
        )
    print(f"two processes take {medians['two'] / medians['one']:.2f} of one's time")


if __name__ == "__main__":
    main()
