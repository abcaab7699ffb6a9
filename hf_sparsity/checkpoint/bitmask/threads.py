"""Threads for work on a long tensor, and the memory they do it in.

torch gathers and scatters in one thread. Page faults cost as much as the work, and threads wait for each other there:
what a thread needs for itself it keeps, and for what it leaves behind it asks in one call.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

from ...core.threads import thread_pool

TASK = 2**21  # elements that a thread works on at a time: with fewer, threads wait for each other between torch's calls
_T = TypeVar("_T")
_buffers = local()


def run_tasks(job: Callable[[int, int], _T], flat: Tensor) -> list[_T]:
    """`job(start, stop)` for each task of `flat`, in order, in as many threads as torch has."""
    spans = [(start, min(start + TASK, flat.numel())) for start in range(0, flat.numel(), TASK)]
    workers = torch.get_num_threads()
    if flat.device.type != "cpu" or len(spans) <= 1 or workers == 1:
        return [job(*span) for span in spans]
    inference = torch.is_inference_mode_enabled()  # a thread has its own
    each = -(-len(spans) // workers)  # neighbours to one thread, which then seldom meet in one page

    def run(start: int) -> list[_T]:
        with torch.inference_mode(inference):
            return [job(*span) for span in spans[start : start + each]]

    return [result for part in thread_pool(workers).map(run, range(0, len(spans), each)) for result in part]


def buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`size` elements that this thread keeps under `name`: fresh pages cost as much as the work done in them."""
    kept: dict[str, Tensor] = vars(_buffers)
    key = f"{name} {dtype} {device}"
    if key not in kept or kept[key].numel() < size:
        with torch.inference_mode(False):  # else it could not be used outside that mode
            kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size]
