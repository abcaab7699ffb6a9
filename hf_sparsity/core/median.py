"""The exact median of more numbers than fit in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 24  # numbers treated at a time, which bounds memory
HALF = 1 << 16  # values of the upper, or the lower, 16 bits of a float32


def median(parts: Callable[[], Iterable[Tensor]]) -> float:
    """Returns the exact median of non-negative float32 tensors taken together, the lower of two as in `torch.median`.

    `parts()` yields the tensors, of any shape, and is called twice. The bits of non-negative floats order as the
    numbers do, so a histogram of their upper 16 bits finds the interval, and one of the lower 16 bits the number.

    Raises:
        ValueError: there are no numbers, or a negative one.
    """
    upper = torch.zeros(HALF, dtype=torch.int64)
    for bits in _bits(parts()):
        upper += torch.bincount(bits >> 16, minlength=HALF).cpu()
    count = int(upper.sum())
    if count == 0:
        raise ValueError("no numbers to take the median of")
    rank = (count - 1) // 2  # how many are before it
    high, rank = _find(upper, rank)
    lower = torch.zeros(HALF, dtype=torch.int64)
    for bits in _bits(parts()):
        lower += torch.bincount(bits[bits >> 16 == high] & (HALF - 1), minlength=HALF).cpu()
    low, _ = _find(lower, rank)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _bits(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        for chunk in torch.split(part.reshape(-1), CHUNK):
            # Adding 0.0 turns -0.0 into 0.0.
            bits = (chunk + 0.0).view(torch.int32)
            if bool((bits < 0).any()):
                raise ValueError("the median is of numbers >= 0")
            yield bits.long()


def _find(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Returns (the bin that holds the number with `rank` others before it, how many of those are in the same bin)."""
    ends = histogram.cumsum(0)
    index = int(torch.searchsorted(ends, torch.tensor(rank), right=True))
    return index, rank - int(ends[index] - histogram[index])
