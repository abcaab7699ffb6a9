"""Products with packed matrices against dense ones, in one run, both sides in turn; medians, and ratios of medians.

    python tests/benchmarks/runtime.py                       # all cores; two minutes
    python tests/benchmarks/runtime.py --threads 1 --cpu     # CPU seconds: on a machine that is busy with other things
    python tests/benchmarks/runtime.py --vectors 4
    python tests/benchmarks/runtime.py --vectors 128 --repeat 5        # the prefill of a prompt

*Faster*: times as fast as the faster of torch's float32 and bf16. *Ceiling*: the share of what the bytes allow, which is
the time of the best dense bf16 loop, made by the same emitter, times the packed matrix's share of the dense bytes. Above 1
the dense loop is bound by something other than memory. A result is compared with torch's before it is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from statistics import median

import torch
from torch.nn import functional

from hf_sparsity.checkpoint.bitmask import codec
from hf_sparsity.runtime.kernels import compiled, has_openmp
from hf_sparsity.runtime.rows import PackedRows, with_room
from hf_sparsity.runtime.spec import SLOTS, Spec


def dense_loop(weight, x, y, lanes):
    """The yardstick: a product of dense bf16 rows with one float32 vector, rows shared among threads."""
    rows, width = weight.shape
    threads = torch.get_num_threads() if has_openmp() else 1
    slots = {"y": y, "wide": x, "values": weight}
    slots = {name: tensor.data_ptr() for name, tensor in slots.items()} | {
        "width": width,
        "rows": rows,
        "threads": threads,
    }
    numbers = [*(slots.get(name, 0) for name in SLOTS), *(rows * t // threads for t in range(threads + 1))]
    job = (ctypes.c_int64 * len(numbers))(*numbers)
    code = compiled("dense", Spec("bf16", "f32", lanes=lanes))
    return lambda: code.run(job)


def measured(jobs, repeat, clock):
    """Median seconds of each job, run in turn."""
    times = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, job in jobs.items():
            start = clock()
            job()
            times[name].append(clock() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def compare(out, width, options, clock):
    """Prints one line for each sparsity."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator)
    chance = torch.rand(out, width, generator=generator)
    x = torch.randn(options.vectors, width, generator=generator)
    short = x.bfloat16()
    for sparsity in options.sparsity:
        kept = weight.masked_fill(chance < sparsity, 0).bfloat16()
        matrix = PackedRows(with_room(codec.pack(kept)))
        wide, y = kept.float(), torch.empty(1, out)
        error = (matrix.multiply(x) - functional.linear(x, wide)).abs().max() / functional.linear(x, wide).abs().max()
        assert error < 1e-4, error
        jobs = {
            "packed": lambda x=x, matrix=matrix: matrix.multiply(x),
            "packed, bf16 in and out": lambda matrix=matrix: matrix.multiply(short),
            "torch float32": lambda x=x, wide=wide: functional.linear(x, wide),
            "torch bf16": lambda kept=kept: functional.linear(short, kept),
        }
        if options.vectors == 1:
            jobs |= {f"dense bf16 loop, {n} lanes": dense_loop(kept, x, y, n) for n in (4, 8)}
        seconds = measured(jobs, options.repeat, clock)
        torch_best = min(seconds["torch float32"], seconds["torch bf16"])
        share = len(matrix.packed) / kept.nbytes
        line = f"  {out}x{width} {sparsity:4.0%}  bytes {share:5.1%}  "
        line += "  ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
        line += f"  faster {torch_best / seconds['packed']:.2f}"
        if options.vectors == 1:
            loop = min(value for name, value in seconds.items() if "loop" in name)
            line += f"  ceiling {share * loop / seconds['packed']:.0%}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--vectors", type=int, default=1, help="activations at once")
    parser.add_argument("--repeat", type=int, default=21, help="the median of this many times")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="rows and columns")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of this thread instead of seconds")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu else time.perf_counter
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(
        f"load average {load:.1f}, {threads} threads, {options.vectors} vectors; {'CPU' if options.cpu else 'wall'} time"
    )
    for out, width in options.shape or ((4096, 4096), (4096, 11008)):
        compare(out, width, options, clock)


if __name__ == "__main__":
    main()
