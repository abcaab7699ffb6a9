"""Kills pruning runs at random moments and lets them go on; run by `test_kill.py` in a process of its own.

    python -m tests.pruning.kill FOLDER TRIALS

The runs are forked from here, where everything is imported and nothing has been computed, so each takes moments.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers as hf

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.checkpoint.streamed import open_streamed
from tests.conftest import tiny, tiny_batch
from tests.tools import contents

JOBS = {  # name: (architecture, streamed, config, hidden_limit)
    "streamed": ("llama", True, SparsityConfig(0.5, allocator="owl", pruner="wanda"), None),
    "second order": ("llama", False, SparsityConfig(0.5, pruner="sparsegpt"), None),
    "experts": ("mixtral", True, SparsityConfig(0.5, allocator="alphapruning", pruner="wanda"), 0),
    "search": (
        "llama",
        True,
        SparsityConfig(0.5, allocator={"name": "msp", "generations": 1, "population": 3, "parents": 2}),
        None,
    ),
}


def job(name: str, source: Path, output: Path) -> None:
    architecture, streamed, config, limit = JOBS[name]
    batch = tiny_batch(architecture, sequences=3)
    batches = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    folder = source / architecture
    model = open_streamed(folder) if streamed else hf.AutoModelForCausalLM.from_pretrained(folder)
    plan = make_plan(model, config, batches, output_dir=output, hidden_limit=limit)
    prune(model, plan, batches, output_dir=output, hidden_limit=limit)


def fork(function, *given) -> int:
    """Runs it in a copy of this process; returns the number of that process."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        function(*given)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(child: int) -> None:
    if status := os.waitpid(child, 0)[1]:
        sys.exit(f"a run ended with status {status}")


def save(source: Path) -> None:
    for architecture in ("llama", "mixtral"):
        tiny(architecture).save_pretrained(source / architecture)


def main(folder: Path, trials: int) -> None:
    rng = random.Random(0)
    finish(fork(save, folder / "source"))
    whole, seconds = {}, {}
    for name in JOBS:
        for run in ("whole", "again"):  # the second is as fast as those that follow
            start = time.monotonic()
            finish(fork(job, name, folder / "source", folder / f"{run} {name}"))
            seconds[name] = time.monotonic() - start
        whole[name] = contents(folder / f"whole {name}")
    killed = 0
    for trial in range(trials):
        name = list(JOBS)[trial % len(JOBS)]
        output = folder / f"out {trial}"
        child = fork(job, name, folder / "source", output)
        time.sleep(rng.uniform(0, seconds[name]))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] != 0
        if (output / "config.json").exists() and {
            k: v for k, v in contents(output).items() if not k.startswith("UNFINISHED")
        } != whole[name]:
            sys.exit(f"trial {trial} ({name}): the folder loads and is wrong")
        if not (output / "config.json").exists() or (output / "UNFINISHED" / "journal.jsonl").exists():
            finish(fork(job, name, folder / "source", output))
        if (found := contents(output)) != whole[name]:
            differing = sorted(key for key in found | whole[name] if found.get(key) != whole[name].get(key))
            sys.exit(f"trial {trial} ({name}): the resumed folder differs in {differing}")
    print(f"{killed} of {trials} runs were killed on the way; all resumed to the same bits")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
