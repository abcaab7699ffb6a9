"""Masks of weights as bits: set, counted, coded in groups, and what they keep taken out and put back.

Bits are uint8 tensors, lowest bit first, padded with zeros to whole words of 8 bytes. The three steps that touch every
weight have loops in `kernels.py`, and here a form for other devices and CPUs. That is arithmetic on whole tensors
without a branch on a weight: torch's `masked_select`, `masked_scatter` and `nonzero`, which branch, take four to eight
times as long on masks of random weights.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import torch
from torch import Tensor

from .kernels import Kernels, kernels
from .threads import buffer

CHUNK = 2**18  # weights at a time where bits are made: temporaries of 3 MB, so that they stay in the cache
GROUPS = (2, 4, 8)  # the M of N:M that have codes
_LANE = 0x0101010101010101  # 1 in each byte of a word
_WIDER = {8: (torch.uint8, torch.int16), 16: (torch.uint16, torch.int32), 32: (torch.uint32, torch.int64)}


def mark(flat: Tensor, bits: Tensor) -> int:
    """Sets in `bits`, which are zero and whole words, those of the elements that are not zero; returns how many."""
    if (loops := _loops(flat)) is not None:
        loops.mark(bits, flat)
        return count(bits)
    mask = flat.new_zeros(min(CHUNK, padded(flat.numel(), 64)), dtype=torch.bool)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        mask[part.numel() :] = False
        mask[: part.numel()].copy_(part)
        # Eight bytes of 0 or 1 times this constant have bit k of the answer in bit 56 + k.
        words = mask.view(torch.int64)[: -(-part.numel() // 8)] * 0x0102040810204080
        bits[start // 8 : start // 8 + words.numel()] = words.view(torch.uint8)[7::8]
    return count(bits)


def count(bits: Tensor) -> int:
    """Returns the number of bits that are set."""
    if (loops := _loops(bits)) is not None:
        return loops.count(bits)
    return int(_count_bits(bits)[1].sum())


def _count_bits(bits: Tensor) -> tuple[Tensor, Tensor]:
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
def _code_tables(kept: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[256]` int64: byte of a mask -> the codes of its groups, 0 for none; and back, int16, -1 for none."""
    width, each = code_width(kept, group), range(8 // group)
    masks = [mask for mask in range(2**group) if mask.bit_count() == kept]  # ascending: code -> mask
    rank = {mask: code for code, mask in enumerate(masks)}
    codes = [sum(rank.get(byte >> k * group & 2**group - 1, 0) << k * width for k in each) for byte in range(256)]
    back = [-1] * 2 ** (width * len(each))
    for chosen in product(range(len(masks)), repeat=len(each)):
        byte = sum(masks[code] << k * group for k, code in enumerate(chosen))
        back[codes[byte]] = byte
    return torch.tensor(codes, device=device), torch.tensor(back, dtype=torch.int16, device=device)


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
    _clear(out, weights)
    return out if count(out) == weights // size * kept else None


def encode(bits: Tensor, kept: int, group: int) -> Tensor:
    """Bits with N in each group -> codes: uint8, at least as many bytes as needed."""
    width, table = code_width(kept, group), _code_tables(kept, group, bits.device)[0]
    words = bits.new_zeros(bits.numel() // group, dtype=torch.int64)  # eight codes: `group` bytes of bits, `width` here
    for k, column in enumerate(bits.view(-1, group).unbind(1)):
        words |= table.index_select(0, column.to(torch.int32)) << k * width * 8 // group
    return words.view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)


def decode(codes: Tensor, groups: int, kept: int, group: int) -> Tensor:
    """`groups` codes -> bits, uint8, padded to whole words; `ValueError` for codes that the pattern has not."""
    width, table = code_width(kept, group), _code_tables(kept, group, codes.device)[1]
    raw = codes.new_zeros(-(-groups // 8), 8)
    raw[: codes.numel() // width, :width] = codes[: codes.numel() // width * width].view(-1, width)
    if rest := codes.numel() % width:
        raw[-1, :rest] = codes[-rest:]
    words, step = raw.view(torch.int64).view(-1), width * 8 // group
    bits = codes.new_zeros(padded(len(words) * group))
    wrong = bool(groups % 8) and int(words[-1]) >> groups % 8 * width != 0
    for k in range(group):
        masks = table.index_select(0, (words >> k * step) & 2**step - 1)
        wrong |= bool((masks < 0).any())
        bits[k : len(words) * group : group] = masks
    if wrong:
        raise ValueError(f"packed weight: a code that {kept}:{group} does not have")
    _clear(bits, groups * group)
    return bits


def _clear(bits: Tensor, weights: int) -> None:
    """Sets the bits after the last weight to 0."""
    last, used = divmod(weights, 8)
    if used:
        bits[last] &= 2**used - 1
    bits[-(-weights // 8) :] = 0


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns two tables over the 256 values of a byte: int32, see `expand`; int64, its eight bits, 0 or 1 each.

    The first: for weights 0 and 1, 2 and 3, … which of the byte's values is the first that either has, from 1 on; one
    less where only the second weight has a value, so that this is the second of the pair.
    """
    bits = [[byte >> k & 1 for k in range(8)] for byte in range(256)]
    first = [[sum(row[:k]) + 1 - (row[k : k + 2] == [0, 1]) for k in range(0, 8, 2)] for row in bits]
    firsts, lanes = (torch.tensor(rows, dtype=torch.int8, device=device) for rows in (first, bits))
    return firsts.view(torch.int32).view(-1), lanes.view(torch.int64).view(-1)


def expand(bits: Tensor, values: Tensor, out: Tensor) -> None:
    """`out` = the next of `values` where a bit is set, 0 elsewhere; integers.

    Two weights a step: all pairs of neighbours in `values` are laid out, each pair of weights fetches the one that
    holds what it keeps, and what it does not keep is multiplied by 0. Where a pair is, is known from a table for the
    byte, from eight additions at once for the word, and from a running sum only for words.
    """
    if (loops := _loops(out)) is not None:
        loops.expand(bits, out, values)
        return
    firsts, lanes = _tables(bits.device)
    before, totals = _count_bits(bits)

    def kept(name: str, size: int, dtype: torch.dtype) -> Tensor:
        # Memory that is given back and taken again costs page faults, for which threads wait for each other.
        return buffer(name, size, dtype, bits.device)

    byte = kept("byte", bits.numel(), torch.int32).copy_(bits)
    near = torch.index_select(firsts, 0, byte, out=kept("near", bits.numel(), torch.int32))
    near.add_(kept("before", bits.numel(), torch.int32).copy_(before), alpha=0x01010101)
    index = kept("index", 4 * bits.numel(), torch.int32).copy_(near.view(torch.int8))
    ends = torch.cumsum(totals, 0, out=kept("ends", totals.numel(), torch.int64))
    index.view(-1, 32).add_(kept("starts", totals.numel(), torch.int32).copy_(ends).sub_(totals).unsqueeze(1))
    pairs = _pairs(values[: int(ends[-1])])
    whole, mask = (kept(name, 8 * bits.numel(), out.dtype) for name in ("whole", "mask"))
    torch.index_select(pairs, 0, index, out=whole.view(pairs.dtype))
    eight = torch.index_select(lanes, 0, byte, out=kept("eight", bits.numel(), torch.int64))
    mask.copy_(eight.view(torch.int8))
    torch.mul(whole[: out.numel()], mask[: out.numel()], out=out)  # `out` is not in the cache: once is enough


def _pairs(values: Tensor) -> Tensor:
    """`[k + 2]`, each twice as wide: (0, v0), (v0, v1), … (v last, 0), (0, 0)."""
    size, bits = values.numel() + 2, 8 * values.element_size()
    if bits == 64:
        both = buffer("pairs", 2 * size, values.dtype, values.device).zero_().view(-1, 2)
        both[1:-1, 0], both[:-2, 1] = values, values
        return both.view(-1).view(torch.complex128)
    unsigned, wide = _WIDER[bits]
    left, pairs = (buffer(name, size + 1, wide, values.device)[: size + 1] for name in ("left", "pairs"))
    left[0], left[-2:] = 0, 0
    left[1:-2] = values.view(unsigned)
    return torch.add(left[:-1], left[1:], alpha=2**bits, out=pairs[:-1])


def compress(flat: Tensor, bits: Tensor, values: Tensor) -> None:
    """`values` = the elements of `flat` whose bit is set; as many as there are."""
    if (loops := _loops(flat)) is not None:
        loops.compress(bits, flat, values)
        return
    lanes = _tables(bits.device)[1].index_select(0, bits.to(torch.int32))
    mask = lanes.view(torch.bool)[: flat.numel()]
    if flat.device.type == "cpu":  # NumPy finds what is set without a branch
        flat.numpy().compress(mask.numpy(), out=values.numpy())
    else:
        values.copy_(flat[mask])


def _loops(flat: Tensor) -> Kernels | None:
    """Returns the compiled loops; None also for what has no memory on the CPU: empty, fake or functional tensors."""
    return kernels(flat.element_size()) if flat.device.type == "cpu" and flat.data_ptr() else None


def padded(count: int, to: int = 8) -> int:
    """The next multiple of `to`."""
    return -(-count // to) * to
