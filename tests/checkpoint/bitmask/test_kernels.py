"""The compiled loops against plain torch, at every length and size, and what they must not touch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_sparsity.checkpoint.bitmask import bits, codec
from hf_sparsity.checkpoint.bitmask import kernels as kernels_module
from hf_sparsity.checkpoint.bitmask.kernels import kernels

needed = pytest.mark.skipif(kernels(2) is None, reason="no llvmlite, or no CPU that it is for")
SIZES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def elements(count, sparsity, size):
    """Random bytes, so that elements have any bits: only the lowest, only the highest, all."""
    generator = torch.Generator().manual_seed(count)
    flat = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(SIZES[size])
    flat[: count // 3] &= 1  # the lowest bit alone, or nothing
    flat[count // 3 : count // 2] <<= 8 * size - 1  # the highest
    flat[torch.rand(count, generator=generator) < sparsity] = 0
    return flat


def packed_bits(flat):
    kept = torch.cat([flat != 0, torch.zeros(-len(flat) % 8, dtype=torch.bool)]).view(-1, 8)
    return (kept * 2 ** torch.arange(8)).sum(1).to(torch.uint8)


def ends_well(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needed
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_equal_to_torch(size, count, sparsity):
    loops, flat = kernels(size), elements(count, sparsity, size)
    marked = torch.full((-(-count // 8) + 2,), 0xA5, dtype=torch.uint8)
    loops.mark(marked, flat)
    assert torch.equal(marked[:-2], packed_bits(flat)) and marked[-2:].tolist() == [0xA5] * 2
    words = torch.nn.functional.pad(marked[:-2], (0, -len(marked[:-2]) % 8))
    assert loops.count(words) == int((flat != 0).sum())
    around = torch.full((int((flat != 0).sum()) + 16,), 77, dtype=flat.dtype)
    narrow = around[8:-8]
    loops.compress(marked, flat, narrow)
    assert torch.equal(narrow, flat[flat != 0]) and (around[:8] == 77).all() and (around[-8:] == 77).all()
    wide = torch.full((count + 16,), 77, dtype=flat.dtype)
    loops.expand(marked, wide[8:-8], narrow)
    assert torch.equal(wide[8:-8], flat) and (wide[:8] == 77).all() and (wide[-8:] == 77).all()


@needed
def test_expand_reads_nothing_after_the_values():
    """The values end where a page ends, and the next page may not be read: a process that does is killed."""
    code = """
import ctypes, mmap, torch
from hf_sparsity.checkpoint.bitmask.kernels import kernels
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
whole = torch.frombuffer(pages, dtype=torch.int16)
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
page = torch.frombuffer(memoryview(pages)[: mmap.PAGESIZE], dtype=torch.int16)
page.copy_(torch.arange(len(page)) + 1)
for short in range(5):  # values that end a little before, too
    kept = torch.zeros(2 * len(page), dtype=torch.uint8)
    kept[: 2 * (len(page) - short) : 2] = 1
    bits = (kept.view(-1, 8) * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    wide = torch.empty(2 * len(page), dtype=torch.int16)
    kernels(2).expand(bits, wide, page[: len(page) - short])
    assert torch.equal(wide[wide != 0], page[: len(page) - short])
"""
    ends_well(code)


@needed
def test_first_used_in_several_threads_at_once():
    """Each may compile; what one of them uses must outlive what is remembered. Code that is gone kills the process."""
    code = """
import gc, threading, torch
from hf_sparsity.checkpoint.bitmask import kernels
bits = torch.full((64,), 255, dtype=torch.uint8)
whole = torch.arange(512, dtype=torch.int16)
right = []
def use():
    ready.wait()
    loops = kernels.kernels(2)
    gc.collect()
    ready.wait()
    wide = torch.empty_like(whole)
    loops.expand(bits, wide, whole)
    right.append(torch.equal(wide, whole))
for _ in range(5):
    kernels.kernels.cache_clear()
    kernels.compiled.cache_clear()
    ready = threading.Barrier(4)
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
assert right == [True] * 20
"""
    ends_well(code)


@needed
@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_where_memory_must_not_be_made_executable():
    found = ends_well("""
import ctypes, torch
from hf_sparsity.checkpoint.bitmask import codec, kernels
refused = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0  # PR_SET_MDWE, Linux 6.3
weight = torch.eye(16)
assert torch.equal(codec.unpack(codec.pack(weight)), weight)
print(refused, kernels.kernels(4) is None)
""")
    if found.startswith("False"):
        pytest.skip("this kernel cannot refuse it")
    assert found.split() == ["True", "True"]


@needed
def test_a_name_of_the_cpu_implies_nothing():
    """Compiled for this one, the loops would have instructions that no CPU of today runs."""
    ends_well("""
import torch
from llvmlite import binding
binding.get_host_cpu_name = lambda: "diamondrapids"
from hf_sparsity.checkpoint.bitmask import codec, kernels
weight = torch.eye(16)
assert torch.equal(codec.unpack(codec.pack(weight)), weight) and kernels.kernels(4) is not None
""")


@needed
def test_without_memory_torch_does_it():
    assert bits.count(torch.empty(0, dtype=torch.uint8)) == 0
    assert bits.mark(torch.empty(0, dtype=torch.int16), torch.empty(0, dtype=torch.uint8)) == 0
    with pytest.raises(RuntimeError):
        codec.pack(torch._efficientzerotensor((8, 8)))


def test_imported_where_processes_cannot_fork():
    ends_well("import os, torch; del os.register_at_fork; import hf_sparsity.core.threads")


@needed
@pytest.mark.parametrize("lacking", ["llvmlite", "bmi2", "fast bmi2", "executable memory"])
def test_without_it_torch_does_the_same(monkeypatch, lacking):
    from llvmlite import binding

    weight = elements(10_000, 0.5, 2).view(100, 100)
    expected = codec.pack(weight)

    def refuse(*_):
        raise OSError("memory must not be made executable")

    if lacking == "llvmlite":
        monkeypatch.setitem(sys.modules, "llvmlite", None)
    elif lacking == "bmi2":
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"sse2": True})
    elif lacking == "fast bmi2":
        monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "znver2")
    else:
        monkeypatch.setattr(binding, "create_mcjit_compiler", refuse)
    for remembered in (kernels_module.kernels, kernels_module.compiled):
        remembered.cache_clear()
    try:
        assert kernels(2) is None
        assert torch.equal(codec.pack(weight), expected) and torch.equal(codec.unpack(expected), weight)
    finally:
        for remembered in (kernels_module.kernels, kernels_module.compiled):
            remembered.cache_clear()
