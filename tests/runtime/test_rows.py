"""Products with packed matrices against the dense ones: every dtype, shape, code, number of vectors and form of the kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparsity.checkpoint.bitmask import codec
from hf_sparsity.runtime import rows as rows_module
from hf_sparsity.runtime.kernels import features
from hf_sparsity.runtime.rows import FEW, PackedRows, with_room
from tests.runtime.matrices import grouped, sparse

KINDS = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}  # of the largest result, and of its dtype
needed = pytest.mark.skipif(features() is None, reason="no llvmlite, or no CPU that kernels are for")


def ready(weight, group=None, swapped=False):
    return PackedRows(with_room(codec.pack(weight, group=group, swapped=swapped)))


def close(found, x, weight, bias=None):
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    limit = TOLERANCE[found.dtype] * max(1.0, wanted.abs().max().item())
    return found.dtype == x.dtype and (found.double() - wanted).abs().max().item() <= limit


def multiplied(weight, io, count, matrix):
    """Whether products with and without a bias are right."""
    x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(count)).to(io)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(9)).to(io)
    return close(matrix.multiply(x), x, weight) and close(matrix.multiply(x, bias), x, weight, bias)


# A kernel takes 0.1 s to compile: here those that most models use, all others in the slow test.
@needed
@pytest.mark.parametrize("width", [576, 200])
def test_products(width):
    weight = sparse(33, width, 0.6, torch.bfloat16)
    matrix = ready(weight)
    assert matrix.compiled
    for io, count in ((torch.bfloat16, 1), (torch.bfloat16, 4), (torch.float32, 1), (torch.bfloat16, 7)):
        assert multiplied(weight, io, count, matrix), (io, count)


@needed
@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_both_widths_of_registers(monkeypatch, dtype, lanes):
    """They give the same results on any CPU that has AVX2."""
    monkeypatch.setattr(rows_module, "lanes", lambda: lanes)
    weight = sparse(5, 136, 0.6, dtype)
    assert multiplied(weight, torch.float32, 1, ready(weight))


@needed
@pytest.mark.parametrize("kept,group", [(1, 2), (2, 4), (4, 8)])
def test_codes(kept, group):
    weight = grouped(9, 192, kept, group, torch.bfloat16)
    for swapped in (False, True):
        matrix = ready(weight.T.contiguous() if swapped else weight, (kept, group), swapped)
        assert matrix.compiled and matrix.header.group
        for count in (1, 6):
            assert multiplied(weight, torch.float32, count, matrix)
    single = ready(weight.float(), (kept, group))
    assert single.compiled == (group < 8) and multiplied(weight, torch.float32, 1, single)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_all_products(monkeypatch, lanes, dtype):
    monkeypatch.setattr(rows_module, "lanes", lambda: lanes)
    codes = [(n, m) for m in (2, 4, 8) for n in range(1, m)]
    for weight, group in (
        *((sparse(*shape, 0.6, dtype), None) for shape in ((1, 8), (3, 64), (5, 200), (70, 576))),
        *((grouped(9, 192, *group, dtype), group) for group in codes),
    ):
        matrix = ready(weight, group)
        for io in KINDS:
            for count in (1, 2, 3, 4, 7):
                assert multiplied(weight, io, count, matrix), (io, count, group)


@pytest.mark.parametrize("count", [0, 1, FEW + 1])
def test_any_leading_shape(count):
    weight = sparse(12, 64, 0.5)
    x = torch.randn(count, 2, 64)
    found = ready(weight).multiply(x)
    assert found.shape == (count, 2, 12)
    assert count == 0 or close(found, x, weight)
    with pytest.raises(ValueError, match="rows of 64 weights with inputs of 63"):
        ready(weight).multiply(torch.randn(1, 63))


@needed
@pytest.mark.parametrize("openmp", [True, False])
def test_threads_change_nothing(monkeypatch, openmp):
    """Also when more shares are made than threads come, and where the threads are our own."""
    weight, x = sparse(97, 1088, 0.6, torch.bfloat16), torch.randn(3, 1088).bfloat16()
    alone = ready(weight).multiply(x)
    monkeypatch.setattr(rows_module, "SHARE", 1000)
    monkeypatch.setattr(rows_module, "has_openmp", lambda: openmp)
    for threads in (2, 3, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(ready(weight).multiply(x), alone)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(rows_module, "features", lambda: None)
    weight, x = sparse(20, 64, 0.6, torch.bfloat16), torch.randn(3, 64)
    matrix = ready(weight)
    assert not matrix.compiled and close(matrix.multiply(x), x, weight)


@pytest.mark.parametrize("weight", [sparse(6, 63, 0.5), sparse(6, 64, 0.5, torch.float64)], ids=["63 wide", "float64"])
def test_what_kernels_do_not_know(weight):
    x = torch.randn(2, weight.shape[1])
    matrix = ready(weight)
    assert not matrix.compiled and close(matrix.multiply(x), x, weight)


def test_strings_anywhere_in_memory():
    """Packed bytes that start or end where they cannot be used are copied."""
    weight, x = sparse(20, 64, 0.6, torch.bfloat16), torch.randn(1, 64)
    packed = codec.pack(weight)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), packed, torch.zeros(99, dtype=torch.uint8)])[
        3 : 3 + len(packed)
    ]
    for string in (packed, shifted, torch.stack([packed, packed], 1)[:, 0]):
        own = with_room(string)
        assert torch.equal(own, packed) and own.data_ptr() % 8 == 0 and with_room(own) is own
        assert close(PackedRows(own).multiply(x), x, weight)


quick = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@needed
@quick
@given(
    st.integers(1, 40), st.integers(1, 30), st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
    st.sampled_from([1, 5]), st.integers(0, 9),
)  # fmt: skip
def test_any_matrix(out, eights, sparsity, count, seed):
    weight = sparse(out, 8 * eights, sparsity, torch.bfloat16, seed)
    assert multiplied(weight, torch.float32, count, ready(weight))


GUARDED = """
import ctypes, mmap, torch
from hf_sparsity.checkpoint.bitmask import codec
from hf_sparsity.runtime import rows
from hf_sparsity.runtime.rows import ROOM, PackedRows, with_room
from tests.runtime.matrices import grouped, sparse
libc, kept = ctypes.CDLL(None), []

def guarded(size):
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    for page in (0, pages + 1):
        address = ctypes.c_void_p(whole.data_ptr() + page * mmap.PAGESIZE)
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    end = (pages + 1) * mmap.PAGESIZE
    kept.append(memory)
    return torch.frombuffer(memoryview(memory)[end - size : end], dtype=torch.uint8)

for lanes in LANES:
    rows.lanes = lambda lanes=lanes: lanes
    for weight, group in (
        *((sparse(o, w, s, d), None) for d in DTYPES for o, w in ((1, 8), (7, 72), (5, 128)) for s in (0.0, 0.5, 1.0)),
        *((grouped(5, 128, *group, torch.bfloat16), group) for group in CODES),
    ):
        packed = codec.pack(weight, group=group)
        string = guarded(len(packed) + ROOM)[: len(packed)].copy_(packed)
        assert with_room(string) is string
        matrix = PackedRows(string)
        for count in COUNTS:
            for io in (torch.bfloat16,):
                x = guarded(count * weight.shape[1] * io.itemsize).view(io).view(count, -1).copy_(torch.randn(count, weight.shape[1]))
                assert torch.allclose(matrix.multiply(x).float(), x.float() @ weight.float().T, atol=0.05, rtol=0.02)
"""


def guarded(lanes, dtypes, codes, counts):
    """Runs the code above in another process, which is killed for a byte too many."""
    names = ", ".join(str(dtype) for dtype in dtypes)
    head = f"import torch\nLANES, DTYPES, CODES, COUNTS = {lanes}, [{names}], {codes}, {counts}\n"
    done = subprocess.run([sys.executable, "-c", head + GUARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needed
def test_nothing_is_read_or_written_outside():
    """The string ends, with its room, where a page ends, and so do the inputs; the next page must not be touched."""
    guarded([4], [torch.bfloat16], [], [1, 5])


@needed
@pytest.mark.slow
def test_nothing_is_read_or_written_outside_by_any_kernel():
    guarded([4, 8], KINDS, [(2, 4), (1, 2), (4, 8), (7, 8)], [1, 2, 3, 4, 5])
