"""A bfloat16 model computed as it is and in float32, a block at a time: CPU seconds of one pass, and memory while it is pruned.

    python tests/benchmarks/precision.py --model smollm2            # see examples/get_smollm2.py

Both sides in one process, one thread. The memory is what is resident and no file (Linux: RssAnon), sampled, above the loaded
model, while Wanda prunes it with `--sequences` x 512 random tokens.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.model.precision import computing


def resident() -> float:
    """Memory of this process that is no file, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Peak:
    """The highest `resident` inside a with block, above what it was at its beginning."""

    def __enter__(self) -> Peak:
        self.before, self.above, self.over = resident(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.above = max(self.above, resident() - self.before)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--compute-dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # not pages of the file
    ids = torch.randint(100, 1000, (options.sequences, 512), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32):
        with computing(model, dtype), torch.no_grad():
            start = time.process_time()
            model.base_model(ids[:1])
            print(f"512 tokens computed in {dtype}: {time.process_time() - start:.1f} CPU seconds", flush=True)
    config = SparsityConfig(0.5, pruner="wanda", compute_dtype=options.compute_dtype)
    with Peak() as peak:
        start = time.process_time()
        report = prune(model, make_plan(model, config), ids)
    print(
        f"Wanda, {options.sequences} x 512 tokens, computed in {report.compute_dtype}: {time.process_time() - start:.1f} CPU "
        f"seconds, {peak.above:.0f} MiB above the model; its weights are {model.dtype}"
    )


if __name__ == "__main__":
    main()
