"""The shuffles that spread values, byte by byte."""

from __future__ import annotations

from hf_sparsity.runtime.spec import Spec
from hf_sparsity.runtime.tables import entry, masks_of_fields, table


def test_an_entry_restated():
    """The mask of the picture in `emit.py`: weights 1, 4, 5 and 7 are kept."""
    mask, zero = 0b10110010, 128
    narrow = [zero, zero, 0, 1, *[zero] * 4, 2, 3, 4, 5, zero, zero, 6, 7]
    assert list(entry(mask, Spec("bf16", "f32", lanes=4).layout)) == narrow
    wide = [number for low in zip(narrow[::2], narrow[1::2], strict=True) for number in (zero, zero, *low)]
    assert list(entry(mask, Spec("bf16", "f32", lanes=8).layout)) == wide
    single = [*[zero] * 4, 0, 1, 2, 3, *[zero] * 8, 0, 1, 2, 3, 4, 5, 6, 7, *[zero] * 4, 8, 9, 10, 11]
    assert list(entry(mask, Spec("f32", "f32").layout)) == single
    assert list(entry(mask, Spec("i8", "f32", lanes=4).layout))[1::2] == [zero, 0, zero, zero, 1, 2, zero, 3]


def test_masks_of_codes():
    assert masks_of_fields(None) == list(range(256))
    pairs = masks_of_fields((2, 4))
    assert len(pairs) == 64 and pairs[0] == 0b00110011 and pairs[1] == 0b00110101 and pairs[8] == 0b01010011
    assert pairs[6] == 0b00110000  # code 6 of 2:4 does not exist
    assert masks_of_fields((1, 2))[0b1010] == 0b10011001


def test_tables_are_aligned():
    memory, address = table(Spec("bf16", "f32", lanes=8).layout, None)
    assert address % 32 == 0 and memory.raw[address % 32 or 0 :]
