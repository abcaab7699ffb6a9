"""Masks of weights as bits: set, counted, coded in groups, turned into places. The machinery under `packing.py`.

Bits are uint8 tensors, lowest bit first, padded with zeros to whole words of 8 bytes. All of it is arithmetic on
whole tensors without a branch on a weight: `masked_select`, `masked_scatter` and `nonzero`, which branch, take three
to ten times as long on masks of random weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from threading import Barrier, local
from typing import TypeVar

import torch
from torch import Tensor

CHUNK = 2**18  # weights at a time: temporaries of 3 MB, so that they stay in the cache
TASK = 2**19  # weights for one thread at a time
GROUPS = (2, 4, 8)  # the M of N:M that have codes
_T = TypeVar("_T")
_LANE = 0x0101010101010101  # 1 in each byte of a word
_buffers = local()


def mark(flat: Tensor, bits: Tensor) -> int:
    """Sets in `bits`, which are zero, those of the elements that are not zero; returns how many."""
    mask = flat.new_zeros(min(CHUNK, padded(flat.numel(), 64)), dtype=torch.bool)
    count = 0
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        mask[part.numel() :] = False
        count += int(torch.count_nonzero(mask[: part.numel()].copy_(part)))
        # Eight bytes of 0 or 1 times this constant have bit k of the answer in bit 56 + k.
        words = mask.view(torch.int64)[: -(-part.numel() // 8)] * 0x0102040810204080
        bits[start // 8 : start // 8 + words.numel()] = words.view(torch.uint8)[7::8]
    return count


def count_bits(bits: Tensor) -> tuple[Tensor, Tensor]:
    """`[bytes]` uint8: bits set before each byte in its word of 8; `[words]` int64: bits set in each word."""
    x = bits.view(torch.int64)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    sums = x * _LANE
    return (sums - x).view(torch.uint8), sums >> 56


def code_width(kept: int, group: int) -> int:
    """Bits of a code."""
    return (math.comb(group, kept) - 1).bit_length()


@cache
def _masks(kept: int, group: int) -> list[int]:
    """The M-bit masks with N bits, ascending: code -> mask."""
    return [mask for mask in range(2**group) if mask.bit_count() == kept]


def fill(bits: Tensor, weights: int, width: int, group: tuple[int, int]) -> Tensor | None:
    """The bits with exactly N in each group, or None when a group has more or there is no code for the pattern.

    `weights`: how many; `width`: of a row, along which the groups lie.
    """
    kept, size = group
    if size not in GROUPS or not 0 < kept < size or width % size:
        return None

    def filled(byte: int) -> int:
        for start in range(0, 8, size):
            for bit in range(start, start + size):
                if (byte >> start & 2**size - 1).bit_count() < kept:
                    byte |= 1 << bit
        return byte

    table = torch.tensor([filled(byte) for byte in range(256)], dtype=torch.uint8, device=bits.device)
    out = table.index_select(0, bits.to(torch.int32))
    last, used = divmod(weights, 8)
    if used:
        out[last] &= 2**used - 1
    out[-(-weights // 8) :] = 0  # what pads the last word
    return out if int(count_bits(out)[1].sum()) == weights // size * kept else None


def encode(bits: Tensor, kept: int, group: int) -> Tensor:
    """Bits with N in each group -> codes: uint8, at least as many bytes as needed."""
    width, masks = code_width(kept, group), _masks(kept, group)
    table = torch.zeros(2**group, dtype=torch.int64, device=bits.device)
    table[masks] = torch.arange(len(masks), device=bits.device)
    places = torch.arange(0, 8, group, device=bits.device)
    shifts = torch.arange(0, 8 * width, width, device=bits.device)
    codes = []
    for chunk in bits.split(CHUNK // 8):
        found = table[chunk.to(torch.int64).unsqueeze(1) >> places & 2**group - 1]
        words = (found.view(-1, 8) << shifts).sum(1)  # eight codes fill `width` bytes exactly
        codes.append(words.view(torch.uint8).view(-1, 8)[:, :width].reshape(-1))
    return torch.cat(codes)


def decode(codes: Tensor, groups: int, kept: int, group: int) -> Tensor:
    """`groups` codes -> bits, uint8, padded to whole words; `ValueError` for codes that the pattern has not."""
    width, masks = code_width(kept, group), _masks(kept, group)
    words = codes.new_zeros(-(-groups // 8), 8)
    words[: codes.numel() // width, :width] = codes[: codes.numel() // width * width].view(-1, width)
    if rest := codes.numel() % width:
        words[-1, :rest] = codes[-rest:]
    shifts = torch.arange(0, 8 * width, width, device=codes.device)
    found = (words.view(torch.int64) >> shifts & 2**width - 1).view(-1)
    if int(found.max()) >= len(masks) or bool(found[groups:].any()):
        raise ValueError(f"packed weight: a code that {kept}:{group} does not have")
    parts = torch.tensor(masks, dtype=torch.int64, device=codes.device)[found]
    parts[groups:] = 0
    joined = (parts.view(-1, 8 // group) << torch.arange(0, 8, group, device=codes.device)).sum(1)
    bits = codes.new_zeros(padded(joined.numel()))
    bits[: joined.numel()] = joined
    return bits


@cache
def _ranks(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tables `[256]` of words, one byte a bit: how many bits are set up to this one, and whether it is."""
    bits = [[b >> k & 1 for k in range(8)] for b in range(256)]
    upto = [list(accumulate(row)) for row in bits]
    tables = (torch.tensor(rows, dtype=torch.int8, device=device) for rows in (upto, bits))
    upto_words, bit_words = (table.view(torch.int64).view(-1) for table in tables)
    return upto_words, bit_words


def fill_slots(bits: Tensor, out: Tensor, scratch: Tensor) -> int:
    """Fills `out` `[8 * bytes]`, int32 or int64, with 1, 2, … at the bits that are set, in order, and 0 elsewhere.

    Returns how many are set. There is no branch on a weight, so random masks cost what regular ones do: ranks in a
    byte from a table, in a word of 64 by eight additions at once, and only those of whole words one by one.
    """
    upto, bit = _ranks(bits.device)
    before, totals = count_bits(bits)
    ends = totals.cumsum(0)
    index = bits.to(torch.int32)
    in_word = before.to(torch.int64).mul_(_LANE).add_(upto.index_select(0, index))
    out.copy_(in_word.view(torch.int8))
    out.view(-1, 64).add_((ends - totals).to(out.dtype).unsqueeze(1))
    out.mul_(scratch.copy_(bit.index_select(0, index).view(torch.int8)))
    return int(ends[-1])


def run_tasks(job: Callable[[int, int], _T], flat: Tensor) -> list[_T]:
    """`job(start, stop)` for each task of `flat`, in order, in as many threads as torch has."""
    spans = [(start, min(start + TASK, flat.numel())) for start in range(0, flat.numel(), TASK)]
    workers = torch.get_num_threads()
    if flat.device.type != "cpu" or len(spans) == 1 or workers == 1:
        return [job(*span) for span in spans]
    inference = torch.is_inference_mode_enabled()  # a thread has its own

    def run(span: tuple[int, int]) -> _T:
        with torch.inference_mode(inference):
            return job(*span)

    return list(_pool(workers).map(run, spans))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads in which torch does not start others: torch gathers and scatters in one thread, so ours do the rest."""
    ready = Barrier(workers)

    def start() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="hf_sparsity")
    for job in [pool.submit(start) for _ in range(workers)]:
        job.result()
    torch.set_num_threads(workers)  # it is also the default of threads to come
    return pool


def buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`size` elements that this thread keeps under `name`: fresh pages cost as much as the work done in them."""
    kept: dict[str, Tensor] = vars(_buffers)
    key = f"{name} {dtype} {device}"
    if key not in kept or kept[key].numel() < size:
        with torch.inference_mode(False):  # else it could not be used outside that mode
            kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size]


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool, but not its threads


def padded(count: int, to: int = 8) -> int:
    """The next multiple of `to`."""
    return -(-count // to) * to
