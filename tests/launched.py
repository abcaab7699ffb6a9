"""What two processes do in `test_launch.py`: `accelerate launch ... -m tests.launched SOURCE OUT`.

With `dying RANK`, what follows are arguments of `hf-sparsity`, and the process of that rank dies on the way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.cli.main import main as command_line
from hf_sparsity.distributed import Processes
from hf_sparsity.pruning import prune as pruning
from tests.conftest import tiny_batch

SEARCH = {"name": "msp", "generations": 1, "population": 4, "parents": 2}
JOBS = {  # name: (architecture, config)
    "wanda": ("llama", SparsityConfig(0.5, allocator="owl", row_allocator="trim")),
    "sparsegpt": ("llama", SparsityConfig(0.5, allocator="mrp", pruner="sparsegpt")),
    "spectra": ("llama", SparsityConfig(0.5, allocator="alphapruning", pruner="magnitude")),
    "search": ("llama", SparsityConfig(0.5, allocator=SEARCH)),
    "experts": ("mixtral", SparsityConfig(0.5)),
}


def batches(architecture: str, count: int = 5) -> list[dict[str, torch.Tensor]]:
    """An odd number, so that the shares differ."""
    batch = tiny_batch(architecture, sequences=count)
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]


def run(name: str, source: Path, output: Path | None = None):
    """(plan, weights) of a job in memory, or streamed into `output`."""
    architecture, config = JOBS[name]
    folder = source / architecture
    model = hf.AutoModelForCausalLM.from_pretrained(folder) if output is None else open_streamed(folder)
    plan = make_plan(model, config, batches(architecture), output_dir=output)
    prune(model, plan, batches(architecture), output_dir=output)
    return plan, None if output else model.state_dict()


def die_at_the_second_block(rank: int) -> None:
    """The process of this rank ends without a word when it solves its second block."""
    prune_block, seen = pruning.prune_block, []

    def dying(*given):
        seen.append(given)
        if len(seen) == 2 and Processes.current().rank == rank:
            os._exit(9)
        return prune_block(*given)

    pruning.prune_block = dying


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "dying":
        die_at_the_second_block(int(sys.argv[2]))
        sys.exit(command_line(sys.argv[3:]))
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in JOBS:
        plan, weights = run(name, source)
        rank = Processes.current().rank
        plan.save(out / f"{name}.{rank}.json")
        save_file({k: v.contiguous() for k, v in weights.items()}, out / f"{name}.{rank}.safetensors")
    run("sparsegpt", source, out / "streamed")


if __name__ == "__main__":
    main()
