"""The operating system, met once: memory given back, memory asked for in one call, files read ahead.

Each function does nothing where the system cannot do it; results never depend on it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from torch import Tensor

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14 and later; older ones refuse it


def release_memory() -> None:
    """Gives freed heap back to the system: glibc keeps it otherwise, and peak memory would grow with depth."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def populate(new: Tensor) -> None:
    """Asks for all pages of a new tensor in one call; one by one, as they are written, they take half as long again."""
    start = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (new.data_ptr() + new.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and new.device.type == "cpu" and size > 0:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _POPULATE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def prefetch(ranges: Iterable[tuple[Any, ...]]) -> None:
    """Reads parts of files into the system's file cache, in this order, in another thread; returns at once.

    `ranges`: `(file, first byte, end, ...)`, as in `Stored`. The system copies the bytes to nowhere, one call for each
    stretch, so that neither memory nor Python's lock is taken.
    """
    if hasattr(os, "sendfile"):
        threading.Thread(target=read_ahead, args=(list(ranges),), daemon=True).start()


def read_ahead(ranges: Iterable[tuple[Any, ...]]) -> None:
    """Does what `prefetch` does, in this thread."""
    stretches: list[list[Any]] = []
    for file, start, end, *_ in ranges:
        if stretches and stretches[-1][0] == file and stretches[-1][2] == start:
            stretches[-1][2] = end
        else:
            stretches.append([file, start, end])
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # the real read reports what is wrong with a file
        for file, start, end in stretches:
            with open(file, "rb", buffering=0) as stream:
                while start < end and (sent := os.sendfile(nowhere.fileno(), stream.fileno(), start, end - start)):
                    start += sent
