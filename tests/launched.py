"""What two processes do in `test_launch.py`.

`accelerate launch ... -m tests.launched RANK ARGUMENTS` runs `hf-sparsity ARGUMENTS`; the process of that rank dies on
the way.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.cli.main import main as command_line
from hf_sparsity.distributed import Processes
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


def run_all(processes: Processes, source: Path, out: Path) -> None:
    """Runs every job in memory, its plan and weights written by each process; and one streamed."""
    for name in JOBS:
        plan, weights = run(name, source)
        plan.save(out / f"{name}.{processes.rank}.json")
        save_file({k: v.contiguous() for k, v in weights.items()}, out / f"{name}.{processes.rank}.safetensors")
    run("sparsegpt", source, out / "streamed")


def command(processes: Processes, arguments: list[str]) -> tuple[int, str]:
    """(exit code, what it printed) of `hf-sparsity ARGUMENTS`."""
    with redirect_stdout(io.StringIO()) as printed:
        code = command_line(arguments)
    return code, printed.getvalue()


def die_after_files(count: int) -> None:
    """Ends this process without a word when it has written so many files."""
    replace, left = os.replace, [count]

    def dying(source, target):
        replace(source, target)
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    os.replace = dying


def main() -> None:
    torch.set_num_threads(1)
    if Processes.current().rank == int(sys.argv[1]):
        die_after_files(3)  # of the inputs of the second block, which it keeps for its four batches
    sys.exit(command_line(sys.argv[2:]))


if __name__ == "__main__":
    main()
