"""One sparse matrix <-> one string of bytes: which weights are kept, then their values.

Layout, version 1. Little-endian; every section starts at a multiple of 8 bytes and is padded with zeros.

    byte  0  4 bytes  "HFSP"
          4  uint8    version, 1
          5  uint8    dtype, an index into `DTYPES`
          6  uint8    N   } the N:M code; both 0 for a bitmask
          7  uint8    M   }
          8  uint8    1: the last two axes are swapped before all that follows; 0: they are not
          9  uint8    number of axes, 2 or 3
         10  6 bytes  zero
         16  3 uint64 shape as the model has it, before any swap; 0 for a missing third axis
         40  uint64   number of values
         48  8 bytes  checksum of the whole string, computed with zeros here
         56  8 bytes  zero
         64  which    bitmask, or N:M codes
          …  values   of the kept weights in row-major order, in the dtype's own bytes

*Bitmask*: bit `i % 8` of byte `i // 8` tells whether weight `i`, row-major, is kept; bits after the last are zero.
A weight is kept unless all its bits are zero, so -0.0 is kept and comes back. One bit a weight, and the values:
in bf16 `1 + 16(1 - s)` bits a weight.

*N:M codes* (M is 2, 4 or 8): of every M consecutive weights exactly N have a value, zeros filled in from the left
where fewer are kept. The code of a group is the rank of its M-bit mask among all with N bits, in ascending order,
in ceil(log2 C(M, N)) bits; codes follow each other from the lowest bit of the first byte. 2:4 takes 3 bits for 4
weights. For larger M a code would save under 1.5 % of a bitmask file, and its tables would be large.

*Checksum*: the string, padded with zeros, as int64 words in rows of 512; the sums of all columns, then of all rows,
modulo 2^64; the first 8 bytes of the SHA-256 of these sums. Two sums run at memory speed on any device, and miss
a change only if it cancels in every row and every column. It finds damage; it is no defence against forgers.

Nothing in a string is trusted: `unpack` checks every number before it allocates or indexes by it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ...core.masks import INTEGERS
from ..system import populate
from .bits import GROUPS, code_width, compress, count, decode, encode, expand, fill, mark, padded
from .threads import TASK, run_tasks

MAGIC, VERSION, HEADER = b"HFSP", 1, 64
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
_HEADER = struct.Struct("<4sBBBBBB6x3QQ8s8x")


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes say; all numbers are checked against each other.

    `group`: (N, M), or None for a bitmask. `values`: how many weights have a value.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: tuple[int, int] | None
    swapped: bool
    values: int

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1 or self.size >= 2**62:
            raise ValueError(f"packed weight: shape {self.shape} is not that of a weight")
        if self.group is None:
            fits = self.values <= self.size
        else:
            kept, group = self.group
            if group not in GROUPS or not 0 < kept < group or self.width % group:
                raise ValueError(f"packed weight: no code for pattern {kept}:{group} in rows of {self.width}")
            fits = self.values == self.size // group * kept
        if not fits:
            raise ValueError(f"packed weight: {self.values} values do not fit {self.size} weights")

    @property
    def size(self) -> int:
        """The number of weights of the matrix."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Weights in a row as packed."""
        return self.shape[-2 if self.swapped else -1]

    @property
    def which_bytes(self) -> int:
        """Bytes of the bitmask or the codes, without padding."""
        if self.group is None:
            return -(-self.size // 8)
        return -(-(self.size // self.group[1] * code_width(*self.group)) // 8)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole string."""
        return HEADER + padded(self.which_bytes) + padded(self.values * self.dtype.itemsize)

    def to_bytes(self, check: bytes = bytes(8)) -> bytes:
        """Returns the header as 64 bytes."""
        kept, group = self.group or (0, 0)
        shape = (*self.shape, 0)[:3]
        code = DTYPES.index(self.dtype)
        return _HEADER.pack(
            MAGIC, VERSION, code, kept, group, self.swapped, len(self.shape), *shape, self.values, check
        )


def pack(weight: Tensor, *, group: tuple[int, int] | None = None, swapped: bool = False) -> Tensor:
    """Returns a matrix as one packed string of bytes.

    Args:
        weight: `[out, in]` or `[experts, out, in]`, of a dtype in `DTYPES`.
        group: (N, M): use the N:M code if the weight has this pattern along its last axis and it is no longer.
        swapped: the weight is stored `[..., in, out]`, so N:M groups run along its last axis but one.

    Returns:
        uint8, one axis, on the weight's device.

    Raises:
        ValueError: an unknown dtype, or a shape that has not 2 or 3 axes or has no elements.
    """
    if weight.dtype not in DTYPES:
        raise ValueError(f"packing has no code for dtype {weight.dtype}")
    header = Header(tuple(weight.shape), weight.dtype, None, swapped, 0)
    flat = _integers(weight.detach().transpose(-1, -2) if swapped else weight.detach())
    bits = flat.new_zeros(padded(-(-flat.numel() // 8)), dtype=torch.uint8)
    counts = run_tasks(lambda a, b: mark(flat[a:b], bits[a // 8 : padded(-(-b // 8))]), flat)
    header = replace(header, values=sum(counts))
    which = bits
    if group is not None and (filled := fill(bits, header.size, header.width, group)) is not None:
        coded = replace(header, group=group, values=flat.numel() // group[1] * group[0])
        if coded.total_bytes <= header.total_bytes:
            header, bits, which = coded, filled, encode(filled, *group)
            counts = run_tasks(lambda a, b: (b - a) // group[1] * group[0], flat)
    packed = flat.new_zeros(header.total_bytes, dtype=torch.uint8)
    packed[HEADER : HEADER + header.which_bytes] = which[: header.which_bytes]
    values, ends = _values(packed, header), [0, *accumulate(counts)]
    run_tasks(lambda a, b: compress(flat[a:b], bits[a // 8 : -(-b // 8)], _share(values, ends, a)), flat)
    packed[:HEADER] = _tensor(header.to_bytes(), packed.device)
    packed[:HEADER] = _tensor(header.to_bytes(_digest(packed)), packed.device)
    return packed


def read_header(packed: Tensor) -> Header:
    """What a packed weight says it is; `ValueError` unless that fits its length."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() < HEADER:
        raise ValueError(f"not a packed weight: {packed.dtype} {tuple(packed.shape)}")
    raw = bytes(packed[:HEADER].tolist())
    magic, version, code, kept, group, swapped, axes, *shape, values, check = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise ValueError("not a packed weight: it does not start with 'HFSP'")
    if version != VERSION:
        raise ValueError(f"packed weight: layout version {version}; this release of hf_sparsity reads {VERSION}")
    if code >= len(DTYPES) or swapped > 1 or axes not in (2, 3):
        raise ValueError(f"packed weight: damaged header (dtype {code}, swapped {swapped}, {axes} axes)")
    pattern = (kept, group) if kept or group else None
    header = Header(tuple(shape[:axes]), DTYPES[code], pattern, bool(swapped), values)
    if header.to_bytes(check) != raw or header.total_bytes != packed.numel():
        raise ValueError(f"packed weight: {packed.numel()} bytes where its header promises {header.total_bytes}")
    return header


def unpack(packed: Tensor) -> Tensor:
    """The matrix that `pack` was given, bit for bit, on the same device.

    Raises:
        ValueError: damaged, cut short, of another version, or contradicting itself.
    """
    packed, header, parts = _checked(packed)
    flat = packed.new_empty(header.size, dtype=INTEGERS[header.dtype.itemsize])
    values, ends = _values(packed, header), [0, *accumulate(kept for _, kept in parts)]

    def write(start: int, stop: int) -> None:
        populate(flat[start:stop])
        expand(parts[start // TASK][0], _share(values, ends, start), flat[start:stop])

    run_tasks(write, flat)
    rows = (*header.shape[:-2], header.shape[-1], header.shape[-2]) if header.swapped else header.shape
    weight = flat.view(header.dtype).view(rows)
    return weight.transpose(-1, -2).contiguous() if header.swapped else weight


def check(packed: Tensor) -> Header:
    """Returns what a packed string says it is, after all checks that `unpack` makes.

    Raises:
        ValueError: what `unpack` refuses.
    """
    return _checked(packed)[1]


def _checked(packed: Tensor) -> tuple[Tensor, Header, list[tuple[Tensor, int]]]:
    """Returns (the string, aligned to words, its header, the mask's bits and their number for each task)."""
    header = read_header(packed)
    if packed.storage_offset() % 8 or packed.data_ptr() % 8 or not packed.is_contiguous():
        packed = packed.clone()  # a slice of a file may start anywhere; words may not
    if _digest(packed) != bytes(packed[48:56].tolist()):
        raise ValueError("packed weight: the checksum is wrong; the data are damaged")
    which = packed[HEADER : HEADER + header.which_bytes]
    parts = run_tasks(lambda a, b: _bits(which, a, b, header), packed[:1].expand(header.size))
    if (total := sum(kept for _, kept in parts)) != header.values:
        raise ValueError(f"packed weight: its mask has {total} bits for {header.values} values")
    return packed, header, parts


def packed_bytes(weight: Tensor) -> int:
    """Returns an upper bound of the length of `pack(weight)`, in bytes, from the number of its zeros alone."""
    kept = int(torch.count_nonzero(_integers(weight.detach())))
    return Header(tuple(weight.shape), weight.dtype, None, False, kept).total_bytes


def checksum(tensor: Tensor) -> str:
    """The layout's checksum over the bytes of any tensor, 16 hex digits."""
    return _digest(tensor.detach().contiguous().view(-1).view(torch.uint8), skip=None).hex()


def _bits(which: Tensor, start: int, stop: int, header: Header) -> tuple[Tensor, int]:
    """Bits of the weights from `start`, a multiple of 64, to `stop`: uint8, padded to whole words; and how many are set.

    `ValueError` for a code that the pattern has not, or a bit after the last weight.
    """
    if header.group is not None:
        kept, group = header.group
        first, groups = start // group * code_width(kept, group) // 8, (stop - start) // group
        bits = decode(which[first : first + -(-groups * code_width(kept, group) // 8)], groups, kept, group)
        return bits, count(bits)
    if stop % 8 and int(which[stop // 8]) >> stop % 8:
        raise ValueError("packed weight: its mask goes on after the last weight")
    part = which[start // 8 : -(-stop // 8)]
    # A copy: of a mapped file that changes in between, other bits would be followed than were counted.
    bits = torch.cat([part, part.new_zeros(-part.numel() % 8)])
    return bits, count(bits)


def _share(values: Tensor, ends: list[int], start: int) -> Tensor:
    """The values of the task that begins at weight `start`; `ends`: where those of each task begin and end."""
    return values[ends[start // TASK] : ends[start // TASK + 1]]


def _integers(weight: Tensor) -> Tensor:
    """Returns all elements in order, as integers of their size."""
    return weight.contiguous().view(-1).view(INTEGERS[weight.element_size()])


def _tensor(raw: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)


def _values(packed: Tensor, header: Header) -> Tensor:
    """The values of a packed weight as integers, a view."""
    start = HEADER + padded(header.which_bytes)
    raw = packed[start : start + header.values * header.dtype.itemsize]
    return raw.view(INTEGERS[header.dtype.itemsize])


def _digest(data: Tensor, skip: int | None = 48) -> bytes:
    """Checksum of uint8 `data`; the 8 bytes at `skip` count as zero."""
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()
    whole = data.numel() // 4096 * 4096
    last = torch.cat([data[whole:], data.new_zeros(4096 - data.numel() + whole)])
    if skip is not None:
        word = data[skip : skip + 8].clone().view(torch.int64)[0]

    def sums(part: Tensor) -> tuple[Tensor, Tensor]:
        words = part.view(torch.int64).view(-1, 512)
        return words.sum(0), words.sum(1)

    parts = [*run_tasks(lambda a, b: sums(data[a:b]), data[:whole]), sums(last)]
    columns, rows = torch.stack([c for c, _ in parts]).sum(0), torch.cat([r for _, r in parts])
    if skip is not None:
        columns[skip // 8] -= word
        rows[0] -= word
    return hashlib.sha256(bytes(torch.cat([columns, rows]).cpu().view(torch.uint8).tolist())).digest()[:8]
