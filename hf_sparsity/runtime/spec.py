"""What a kernel is made for, and what it is told when it runs."""

from __future__ import annotations

from dataclasses import dataclass

VALUE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1}
# Slots of a job, 8 bytes each; the places where the threads' shares of the rows begin and end follow.
SLOTS = (
    *("x", "y", "wide", "bits", "values", "starts", "bias", "scales", "table"),
    *("width", "padded", "words", "row_bytes", "last_mask", "rows", "threads"),
)
SLOT = {name: number for number, name in enumerate(SLOTS)}
NOTHING = -1  # in a layout: a byte that is zero


@dataclass(frozen=True)
class Spec:
    """What a kernel is made for.

    `values`: how kept weights are stored: "bf16", "f16", "f32" or "i8". `io`: what activations and results are, "bf16",
    "f16" or "f32". `field`: bits that describe eight weights. `step`: values of eight weights, or 0 where the field's
    bits are counted. `tail`: the rows are no multiple of 64 weights. `rows`, `vectors`: how many at once. `sums`: partial
    sums of each result. `lanes`: float32 in a register, 4 or 8.
    """

    values: str
    io: str
    field: int = 8
    step: int = 0
    tail: bool = False
    rows: int = 1
    vectors: int = 1
    sums: int = 2
    lanes: int = 8

    @property
    def layout(self) -> tuple[int, ...]:
        """The bytes of a value that a shuffle puts into each byte of a weight's lane; `NOTHING` for zero."""
        if self.values == "f32":
            return (0, 1, 2, 3)
        if self.values == "f16":
            return (0, 1)
        high = (0, 1) if self.values == "bf16" else (NOTHING, 0)
        return high if self.lanes == 4 else (NOTHING, NOTHING, *high)

    @property
    def entry_bytes(self) -> int:
        """The size of the table's entries: the shuffle of eight weights."""
        return 8 * len(self.layout)

    @property
    def widened(self) -> bool:
        """True where activations are copied before they are multiplied: as float32, whole words, vectors side by side."""
        return self.io != "f32" or self.tail or self.vectors > 1
