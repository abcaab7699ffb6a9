"""Threads that share the cores with torch's own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


@cache
def thread_pool(workers: int, each: int = 1) -> ThreadPoolExecutor:
    """Returns `workers` threads, kept for later calls, in each of which torch uses `each` threads.

    The number of threads that torch uses in the calling thread stays as it is.
    """
    before = torch.get_num_threads()
    ready = Barrier(workers)

    def start() -> None:
        torch.set_num_threads(each)
        ready.wait(timeout=10)  # seconds; ends with an error if one of the threads cannot be started

    pool = ThreadPoolExecutor(workers, thread_name_prefix="hf_sparsity")
    for job in [pool.submit(start) for _ in range(workers)]:
        job.result()
    torch.set_num_threads(before)  # `set_num_threads` also sets the default of threads to come
    return pool


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=thread_pool.cache_clear)  # a forked process has the pool, but not its threads
