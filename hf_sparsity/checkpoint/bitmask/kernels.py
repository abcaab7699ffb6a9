"""The loops over the bits of a mask, compiled when they are first needed, for CPUs that have instructions for them.

torch has no fast form of what these do: spreading packed values over the weights that keep them, and gathering them.
x86-64 with BMI2 does it for 8 bytes at once: `pdep` and `pext` (Intel from 2013 on, AMD from Zen 3 on; before, AMD's
were microcode, and slow). The few lines below are LLVM's own language, compiled by llvmlite in some 30 ms; on other
CPUs, or without llvmlite, `kernels` returns None and `bits.py` does the same with torch.

"Wide" is what has an element for every weight, "narrow" what has one for every bit that is set.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from .threads import buffer

logger = logging.getLogger(__name__)

_SLOW = {"bdver4", "znver1", "znver2"}  # LLVM's names of the AMD cores before Zen 3 that have the instructions

_POINTER = ctypes.c_void_p

# Each reads or writes a byte of `bits` a turn, 8 elements of `wide`, and as many of `narrow` as bits are set.
_LOOP = """
define ptr @{name}(ptr %bits, i64 %bytes, ptr %wide, ptr %narrow) {{
start:
  br label %loop
loop:
  %turn = phi i64 [ 0, %start ], [ %next, %loop ]
  %narrow0 = phi ptr [ %narrow, %start ], [ %narrow{words}, %loop ]
  %byte = getelementptr i8, ptr %bits, i64 %turn
  %row = getelementptr [{words} x i64], ptr %wide, i64 %turn
{body}
  %next = add i64 %turn, 1
  %more = icmp ult i64 %next, %bytes
  br i1 %more, label %loop, label %end
end:
  ret ptr %narrow{words}
}}
"""
_LOAD_BYTE = """
  %loaded = load i8, ptr %byte
  %which = zext i8 %loaded to i64
"""
# The next bits of the byte, one to each element of a word of `wide`, then as masks of whole elements; word {k} of {words}.
_MASK = """
  %part{k} = lshr i64 %which, {shift}
  %lanes{k} = call i64 @llvm.x86.bmi.pdep.64(i64 %part{k}, i64 {lowest})
  %mask{k} = mul i64 %lanes{k}, {element}
  %set{k} = call i64 @llvm.ctpop.i64(i64 %mask{k})
  %step{k} = lshr i64 %set{k}, 3
  %narrow{next} = getelementptr i8, ptr %narrow{k}, i64 %step{k}
  %at{k} = getelementptr i64, ptr %row, i64 {k}
"""
_EXPAND = """
  %near{k} = load i64, ptr %narrow{k}, align 1
  %word{k} = call i64 @llvm.x86.bmi.pdep.64(i64 %near{k}, i64 %mask{k})
  store i64 %word{k}, ptr %at{k}, align 1
"""
_COMPRESS = """
  %word{k} = load i64, ptr %at{k}, align 1
  %near{k} = call i64 @llvm.x86.bmi.pext.64(i64 %word{k}, i64 %mask{k})
  store i64 %near{k}, ptr %narrow{k}, align 1
"""
# An element is not zero when its highest bit is set, or becomes so when all bits below it are added to those below it.
_MARK = """
  %at{k} = getelementptr i64, ptr %row, i64 {k}
  %word{k} = load i64, ptr %at{k}, align 1
  %below{k} = and i64 %word{k}, {below}
  %carried{k} = add i64 %below{k}, {below}
  %either{k} = or i64 %word{k}, %carried{k}
  %found{k} = call i64 @llvm.x86.bmi.pext.64(i64 %either{k}, i64 {highest})
  %placed{k} = shl i64 %found{k}, {shift}
  %which{next} = or i64 %which{k}, %placed{k}
  %narrow{next} = getelementptr i8, ptr %narrow{k}, i64 0
"""
_STORE_BYTE = """
  %all = trunc i64 %which{words} to i8
  store i8 %all, ptr %byte
"""

_COUNT = """
define i64 @count(ptr %bits, i64 %words) {
start:
  br label %loop
loop:
  %turn = phi i64 [ 0, %start ], [ %next, %loop ]
  %sum = phi i64 [ 0, %start ], [ %more, %loop ]
  %at = getelementptr i64, ptr %bits, i64 %turn
  %word = load i64, ptr %at, align 1
  %set = call i64 @llvm.ctpop.i64(i64 %word)
  %more = add i64 %sum, %set
  %next = add i64 %turn, 1
  %again = icmp ult i64 %next, %words
  br i1 %again, label %loop, label %end
end:
  ret i64 %more
}
"""


class Kernels(NamedTuple):
    """The compiled loops for elements of one size; all take integers on the CPU, contiguous, and release Python's lock.

    `count(bits)`: how many are set, of whole words of 8 bytes, at least one. `mark(bits, wide)`: sets the bits of the
    elements that are not zero. `expand(bits, wide, narrow)`: `wide` = the next of `narrow` where a bit is set, 0
    elsewhere. `compress(bits, wide, narrow)`: the way back. `bits`: uint8, one for each element of `wide` and perhaps
    more; `narrow` must have as many elements as bits are set; this is not checked here.
    """

    count: Callable[[Tensor], int]
    mark: Callable[[Tensor, Tensor], None]
    expand: Callable[[Tensor, Tensor, Tensor], None]
    compress: Callable[[Tensor, Tensor, Tensor], None]


@cache
def kernels(size: int) -> Kernels | None:
    """The loops for elements of `size` bytes, 1, 2, 4 or 8; None where they cannot be had."""
    engine = compiled()
    if engine is None:
        return None
    run = {name: _function(engine, f"{name}{size}", *[_POINTER] * 2) for name in ("mark", "expand", "compress")}
    counted = _function(engine, "count", result=ctypes.c_int64)

    def count(bits: Tensor) -> int:
        return int(counted(bits.data_ptr(), bits.numel() // 8))

    def walk(name: str, bits: Tensor, wide: Tensor, narrow: int, write: bool) -> None:
        """Runs a loop over all of `wide`; the last, incomplete byte of bits is processed in a buffer of 8 elements."""
        whole, rest = divmod(wide.numel(), 8)
        if whole:
            narrow = run[name](bits.data_ptr(), whole, wide.data_ptr(), narrow)
        if rest:
            last = buffer("last", 8, wide.dtype, wide.device).zero_()
            last[:rest] = wide[8 * whole :]
            run[name](bits[whole:].data_ptr(), 1, last.data_ptr(), narrow)
            if write:
                wide[8 * whole :] = last[:rest]

    def mark(bits: Tensor, wide: Tensor) -> None:
        walk("mark", bits, wide, wide.data_ptr(), write=False)

    # A word is read or written where the last value is: up to 8 bytes after it, which may belong to another tensor or to none.
    def expand(bits: Tensor, wide: Tensor, narrow: Tensor) -> None:
        after = narrow.untyped_storage().nbytes() - (narrow.storage_offset() + narrow.numel()) * size
        if after < 8 or not narrow.numel():  # torch says that what is empty has no address
            own = buffer("narrow", narrow.numel() + 8, narrow.dtype, narrow.device)
            own[:-8] = narrow
            narrow = own
        walk("expand", bits, wide, narrow.data_ptr(), write=True)

    def compress(bits: Tensor, wide: Tensor, narrow: Tensor) -> None:
        own = buffer("narrow", narrow.numel() + 8, narrow.dtype, narrow.device)
        walk("compress", bits, wide, own.data_ptr(), write=False)
        narrow.copy_(own[:-8])

    return Kernels(count, mark, expand, compress)


def _function(engine: Any, name: str, *more: Any, result: Any = _POINTER) -> Any:
    """A loop whose arguments begin with the bits and the number of turns."""
    function = ctypes.CFUNCTYPE(result, _POINTER, ctypes.c_int64, *more)(engine.get_function_address(name))
    function.engine = engine  # type: ignore[attr-defined]  # the code is freed with the last function that uses it
    return function


@cache
def compiled() -> Any:
    """llvmlite's engine; None without it or without a fast BMI2. Threads that come at once get one each, and use it."""
    try:
        from llvmlite import binding as llvm

        features = llvm.get_host_cpu_features()
        if not (features.get("bmi2") and features.get("popcnt")) or llvm.get_host_cpu_name() in _SLOW:
            return None
        llvm.check_jit_execution()  # where memory must not be made executable, compiling says nothing and running kills
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        # Not for the CPU by name: under some kernels and hypervisors it lacks what its name implies.
        machine = llvm.Target.from_default_triple().create_target_machine(features="+bmi2,+popcnt", opt=2)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_source()), machine)
        engine.finalize_object()
    except Exception as error:  # not there, damaged, refused: nothing is lost but time
        logger.debug("packing is not compiled: %s", error)
        return None
    return engine


def _source() -> str:
    """Returns the source of all loops, for elements of 1, 2, 4 and 8 bytes."""
    declared = [f"declare i64 @llvm.x86.bmi.{name}.64(i64, i64)\n" for name in ("pdep", "pext")]
    parts = [*declared, "declare i64 @llvm.ctpop.i64(i64)\n", _COUNT]
    for size in (1, 2, 4, 8):
        each, bits = 8 // size, 8 * size  # elements in a word, bits in an element
        lowest = sum(1 << bits * k for k in range(each))
        numbers = {
            "words": size,
            "lowest": lowest,
            "element": 2**bits - 1,
            "highest": lowest << bits - 1,
            "below": lowest * (2 ** (bits - 1) - 1),
        }

        def steps(text: str, each: int = each, numbers: dict[str, int] = numbers) -> str:
            return "".join(text.format(k=k, next=k + 1, shift=each * k, **numbers) for k in range(numbers["words"]))

        bodies = {
            "expand": _LOAD_BYTE + steps(_MASK + _EXPAND),
            "compress": _LOAD_BYTE + steps(_MASK + _COMPRESS),
            "mark": "  %which0 = add i64 0, 0\n" + steps(_MARK) + _STORE_BYTE.format(**numbers),
        }
        parts += [_LOOP.format(name=f"{name}{size}", words=size, body=body) for name, body in bodies.items()]
    return "".join(parts)
