"""Products with a packed matrix: the bytes of a packed string, made ready once, then multiplied without unpacking.

Up to four vectors are multiplied in one pass over the bytes. More, as in the prefill of a prompt, are multiplied by
torch with tiles of rows that are unpacked into memory that stays in the cache. On other devices and CPUs, and for the few
matrices that kernels do not know, the matrix is unpacked for each product.
"""

from __future__ import annotations

import ctypes
import struct
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..checkpoint.bitmask import codec
from ..checkpoint.bitmask.bits import code_width, padded
from ..core.threads import thread_pool
from .kernels import Code, compiled, features, has_openmp, lanes
from .spec import SLOT, SLOTS, Spec
from .tables import table

FEW = 4  # vectors in one pass
ROOM = 64  # bytes after a packed string that kernels may read, and do not use
SHARE = 2**16  # bytes of a matrix for which a thread is worth waking
TILE = 2**20  # bytes of float32 that are unpacked at a time where many vectors are multiplied
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.int8: "i8"}
_IO = (torch.float32, torch.bfloat16, torch.float16)
_kept = local()


def with_room(packed: Tensor) -> Tensor:
    """Returns a packed string with `ROOM` behind it: the same, where it has it and starts at a whole word, or a copy."""
    storage = packed.untyped_storage().nbytes()
    if packed.device.type != "cpu" or not packed.data_ptr():
        return packed
    if (
        packed.is_contiguous()
        and packed.data_ptr() % 8 == 0
        and storage - packed.storage_offset() >= len(packed) + ROOM
    ):
        return packed
    return torch.empty(len(packed) + ROOM, dtype=torch.uint8)[: len(packed)].copy_(packed)


class _Call(NamedTuple):
    """A product that needs the addresses of its tensors only.

    `kind` is the type of its jobs, `template` a job without those addresses, `wide` the bytes of scratch that it needs.
    """

    code: Code
    kind: Any
    template: bytes
    wide: int
    threads: int
    pooled: bool


class PackedRows:
    """A packed string made ready for products: `[out, in]`, or a number of such matrices, the experts.

    `packed` is as `with_room` returns it, and checked: of wrong bits, kernels would read what is not theirs.
    """

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed
        self.header = header = codec.read_header(packed)
        *experts, first, second = header.shape
        self.experts = experts[0] if experts else 1
        self.out, self.width = (second, first) if header.swapped else (first, second)
        self.address = packed.data_ptr()
        self.compiled = _is_known(header) and packed.device.type == "cpu" and features() is not None
        self._calls: dict[tuple[int, torch.dtype, int, int], _Call] = {}
        if self.compiled:
            self._prepare()

    def _prepare(self) -> None:
        """Finds where each row's values start."""
        header = self.header
        kept, group = header.group or (0, 0)
        self.field = 8 // group * code_width(kept, group) if group else 8
        self.step = 8 * kept // group if group else 0
        self.words = -(-self.width // 64)
        self.row_bytes = self.width * self.field // 64
        values = codec.HEADER + padded(header.which_bytes)
        self.starts = torch.empty(self.experts, self.out + 1, dtype=torch.int32)
        if group:
            self.starts.copy_(torch.arange(self.out + 1) * (self.width * kept // group))
        else:
            for expert in range(self.experts):
                self._run_rows("starts", self._spec(), self._slots(expert, y=self.starts[expert].data_ptr()))
        self.bases = [0]  # bytes before each expert's values
        for total in self.starts[:, -1].tolist():
            self.bases.append(self.bases[-1] + total * header.dtype.itemsize)
        self.values = self.address + values
        self.share_bytes = self.row_bytes * self.out + self.bases[-1] // self.experts

    def _spec(self, **more: Any) -> Spec:
        """Returns what to compile for this matrix."""
        values, tail = KINDS[self.header.dtype], bool(self.width % 64)
        return Spec(
            values=values, io=more.pop("io", "f32"), field=self.field, step=self.step, tail=tail, lanes=lanes(), **more
        )

    def _slots(self, expert: int, **more: int) -> list[int]:
        """Returns the slots of a job, in order."""
        rest = self.width % 64
        known = {
            "bits": self.address + codec.HEADER + expert * self.out * self.row_bytes,
            "table": table(self._spec().layout, self.header.group)[1],
            "width": self.width,
            "padded": 64 * self.words,
            "words": self.words,
            "row_bytes": self.row_bytes,
            "last_mask": 2**rest - 1 if rest else -1,
            "rows": self.out,
            "threads": 1,
        }
        if hasattr(self, "values"):
            known |= {"values": self.values + self.bases[expert], "starts": self.starts[expert].data_ptr()}
        known |= more
        return [known.get(slot, 0) for slot in SLOTS]

    def _run_rows(self, kind: str, spec: Spec, slots: list[int], first: int = 0, last: int | None = None) -> None:
        """Runs a kernel over some rows in this thread."""
        job = (ctypes.c_int64 * len(slots))(*slots)
        compiled(kind, spec).rows(job, first, self.out if last is None else last)

    def _cuts(self, expert: int, threads: int) -> list[int]:
        """Returns where the threads' shares of the rows begin and end: the same number of bytes for each."""
        rows = torch.arange(self.out + 1) * self.row_bytes + self.starts[expert].long() * self.header.dtype.itemsize
        ends = torch.searchsorted(rows, torch.arange(1, threads) * int(rows[-1]) // threads).tolist()
        return [0, *ends, self.out]

    # ---- products

    def multiply(self, x: Tensor, bias: Tensor | None = None, expert: int = 0) -> Tensor:
        """Returns `x @ W.T + bias` as `torch.nn.functional.linear` does: x `[..., in]`, the result `[..., out]`, of x's dtype."""
        shape, dtype = x.shape, x.dtype
        if shape[-1] != self.width:
            raise ValueError(f"a product of rows of {self.width} weights with inputs of {shape[-1]}")
        if not (self.compiled and x.is_cpu):
            return functional.linear(x, self.dense(expert).to(dtype), bias)
        if dtype not in _IO:
            return self.multiply(x.float(), bias, expert).to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        count = x.numel() // self.width
        y = x.new_empty((*shape[:-1], self.out))
        if count > FEW:
            self._many(x.reshape(count, self.width), y.view(count, self.out), bias, expert)
        elif count:
            self._few(
                x if x.is_contiguous() else x.contiguous(), y, bias, (count, dtype, expert, torch.get_num_threads())
            )
        return y

    def _few(self, x: Tensor, y: Tensor, bias: Tensor | None, key: tuple[int, torch.dtype, int, int]) -> None:
        """Multiplies in one pass over the bytes; `key`: vectors, their dtype, expert, threads. As little Python as can be."""
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._make_call(*key)
        job = call.kind.from_buffer_copy(call.template)
        job[_X] = job[_WIDE] = x.data_ptr()
        job[_Y] = y.data_ptr()
        if bias is not None:
            job[_BIAS] = bias.data_ptr()
        if call.wide:
            job[_WIDE] = scratch(call.wide)
        if call.pooled:
            _run_in_pool(call.code, job, call.threads)
        else:
            call.code.run(job)

    def _make_call(self, count: int, dtype: torch.dtype, expert: int, threads: int) -> _Call:
        """Returns all that does not change from one product to the next."""
        threads = min(threads, 1 + self.share_bytes // SHARE)
        rows, sums = BLOCKING[count]
        spec = self._spec(io=KINDS[dtype], rows=rows, vectors=count, sums=sums)
        slots = [*self._slots(expert, threads=threads), *self._cuts(expert, threads)]
        return _Call(
            code=compiled("product", spec),
            kind=ctypes.c_int64 * len(slots),
            template=struct.pack(f"{len(slots)}q", *slots),
            wide=256 * self.words * count if spec.widened else 0,
            threads=threads,
            pooled=threads > 1 and not has_openmp(),
        )

    def _many(self, x: Tensor, y: Tensor, bias: Tensor | None, expert: int) -> None:
        """Multiplies tile by tile: rows unpacked as float32, then torch's own product of float32."""
        wide = x.float()
        result = y if y.dtype == torch.float32 else y.new_empty(y.shape, dtype=torch.float32)
        rows = min(max(16, TILE // (256 * self.words) // 8 * 8), self.out)
        tile = torch.frombuffer(_memory(rows * 256 * self.words), dtype=torch.float32)[: rows * 64 * self.words].view(
            rows, -1
        )
        spec = self._spec()
        for first in range(0, self.out, rows):
            last = min(first + rows, self.out)
            self._spread(spec, expert, tile, first, last)
            torch.mm(wide, tile[: last - first, : self.width].T, out=result[:, first:last])
        if bias is not None:
            result += bias
        if result is not y:
            y.copy_(result)

    def _spread(self, spec: Spec, expert: int, into: Tensor, first: int, last: int) -> None:
        """Writes rows as dense float32 into the rows of `into`, which are a multiple of 64 long."""
        slots = self._slots(expert, y=into.data_ptr() - first * 256 * self.words)
        self._run_rows("spread", spec, slots, first, last)

    def dense(self, expert: int | None = None) -> Tensor:
        """Returns the matrix as it was packed, `[out, in]`, or all experts for None and as the model has it."""
        whole = codec.unpack(self.packed)
        if expert is None:
            return whole
        if whole.ndim == 3:
            whole = whole[expert]
        return whole.T if self.header.swapped else whole


BLOCKING = {1: (2, 2), 2: (2, 1), 3: (2, 1), 4: (1, 1)}  # vectors -> rows at once, partial sums; measured
_X, _Y, _WIDE, _BIAS = (SLOT[name] for name in ("x", "y", "wide", "bias"))


def _is_known(header: codec.Header) -> bool:
    """Returns whether kernels can read such a matrix: rows of whole bytes, and codes of whole words."""
    if header.dtype not in KINDS or header.dtype == torch.int8:
        return False
    *_, first, second = header.shape
    width = first if header.swapped else second
    if header.group is None:
        return width % 8 == 0 and first * second < 2**31
    return width % 64 == 0 and not (header.dtype == torch.float32 and header.group[1] == 8) and first * second < 2**31


def _memory(size: int) -> memoryview:
    """`size` bytes that this thread keeps, at a multiple of 64."""
    if getattr(_kept, "size", -1) < size:
        _kept.tensor = torch.empty(size + 64, dtype=torch.uint8)
        offset = -_kept.tensor.data_ptr() % 64
        _kept.address, _kept.size = _kept.tensor.data_ptr() + offset, size
        _kept.view = _kept.tensor.numpy()[offset:].data
    return _kept.view


def scratch(size: int) -> int:
    """The address of `size` bytes that this thread keeps."""
    _memory(size)
    return _kept.address


def _run_in_pool(code: Code, job: Any, threads: int) -> None:
    """Runs a job's shares in threads of our own, where OpenMP's are not to be had."""
    if code.widen is not None:
        code.widen(job)
    first = len(job) - threads - 1
    shares = [(job[first + k], job[first + k + 1]) for k in range(threads)]
    list(thread_pool(threads).map(lambda share: code.rows(job, *share), shares))
