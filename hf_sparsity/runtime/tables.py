"""The tables by which kernels spread values: for each field, where the bytes of eight 32-bit lanes come from."""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import combinations

_ZERO = 128  # for which the shuffle writes zero


def masks_of_fields(group: tuple[int, int] | None) -> list[int]:
    """Returns the mask of eight weights that each field means, lowest bit first; `group`: (N, M) of codes, None of masks.

    A field of codes is the codes of 8 / M groups, see `checkpoint/bitmask/codec.py`. Codes that do not exist keep nothing.
    """
    if group is None:
        return list(range(256))
    kept, size = group
    masks = sorted(sum(1 << bit for bit in chosen) for chosen in combinations(range(size), kept))
    width = (len(masks) - 1).bit_length()
    masks += [0] * (2**width - len(masks))
    each = range(8 // size)
    fields = range(2 ** (width * len(each)))
    return [sum(masks[field >> k * width & 2**width - 1] << k * size for k in each) for field in fields]


def entry(mask: int, layout: tuple[int, ...]) -> bytes:
    """Returns the shuffle of one mask, 8 bytes for each of the layout; `layout`: see `Spec`."""
    order: list[int] = []
    place = 0  # among the values that were loaded
    for bit in range(8):
        if len(layout) == 4 and min(layout) == 0 and bit == 4:
            place = 0  # of float32 the second four are loaded on their own
        size, kept = max(layout) + 1, mask >> bit & 1
        order += [size * place + byte if kept and byte >= 0 else _ZERO for byte in layout]
        place += kept
    return bytes(order)


@cache
def table(layout: tuple[int, ...], group: tuple[int, int] | None) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """Returns a table, kept for the process, and its address, a multiple of 32."""
    raw = b"".join(entry(mask, layout) for mask in masks_of_fields(group))
    memory = ctypes.create_string_buffer(len(raw) + 32)
    start = -ctypes.addressof(memory) % 32
    ctypes.memmove(ctypes.addressof(memory) + start, raw, len(raw))
    return memory, ctypes.addressof(memory) + start
