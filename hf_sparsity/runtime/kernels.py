"""The compiled kernels: made when they are first needed, kept for the process, chosen by what the CPU can do.

The code comes from `emit.py`, by llvmlite. Where that is not installed, or the CPU is not x86-64 with AVX2, FMA and F16C,
`features` is None, and products are made by torch from unpacked weights.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .spec import Spec

logger = logging.getLogger(__name__)

_NEEDED = ("avx2", "fma", "f16c", "popcnt", "bmi2")
_NARROW = {"znver1"}  # LLVM's names of CPUs that do 256 bits as twice 128
_THREADS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@dataclass(frozen=True)
class Code:
    """Compiled functions that take the address of a job, and release Python's lock.

    `run(job)` does all rows, in OpenMP's threads where the job has several shares. `rows(job, first, last)` does some of
    them, after `widen(job)` where there is one. `engine` owns the machine code.
    """

    run: Callable[[Any], None]
    rows: Callable[[Any, int, int], None]
    widen: Callable[[Any], None] | None
    engine: Any


@cache
def features() -> tuple[str, ...] | None:
    """Returns the instructions that kernels use, by LLVM's names; None where they cannot be compiled or would not run."""
    try:
        from llvmlite import binding as llvm

        found = llvm.get_host_cpu_features()
        if not all(found.get(name) for name in _NEEDED):
            return None
        llvm.check_jit_execution()  # where memory must not be made executable, compiling says nothing and running kills
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.initialize_native_asmparser()
    except Exception as error:  # not there, damaged, refused: nothing is lost but time
        logger.debug("products with packed weights are not compiled: %s", error)
        return None
    return _NEEDED


@cache
def lanes() -> int:
    """Returns how many float32 the CPU handles at once."""
    from llvmlite import binding as llvm

    return 4 if llvm.get_host_cpu_name() in _NARROW else 8


@cache
def has_openmp() -> bool:
    """Returns whether kernels can run in the threads of torch's own loops: on Linux, where GNU's OpenMP is loaded.

    Their pool stands ready, wakes in microseconds and is not in the way of torch's.
    """
    from llvmlite import binding as llvm

    try:
        process = ctypes.CDLL(None)
        for name in _THREADS:
            llvm.add_symbol(name, ctypes.cast(getattr(process, name), ctypes.c_void_p).value)
    except (AttributeError, OSError, TypeError):  # the last: Windows has no library of the process
        return False
    return True


@cache
def compiled(kind: str, spec: Spec) -> Code:
    """Returns a kernel, compiled on the first call for it in some 40 ms.

    `kind`: "product", "spread", "starts" or "dense", see `Emitter`. Only where `features` is not None.
    """
    from llvmlite import binding as llvm
    from llvmlite import ir

    from .emit import Emitter

    needed = features()
    assert needed is not None
    module = ir.Module()
    emitter = Emitter(module, spec)
    getattr(emitter, f"emit_{kind}")()
    emitter.emit_run(has_openmp())
    text = ",".join(f"+{name}" for name in needed)
    # Not for the CPU by name: under some kernels and hypervisors it lacks what its name implies.
    machine = llvm.Target.from_default_triple().create_target_machine(features=text, opt=2)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    of_job = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    of_rows = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return Code(
        run=of_job(engine.get_function_address("run")),
        rows=of_rows(engine.get_function_address("rows")),
        widen=of_job(engine.get_function_address("widen")) if "widen" in module.globals else None,
        engine=engine,
    )
