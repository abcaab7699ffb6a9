"""The packed layout: byte literals, bit-equal round trips, sizes, and hostile or damaged strings."""

from __future__ import annotations

import importlib.util
import math
import random
import struct

import pytest
import torch

from hf_sparsity.checkpoint.bitmask import bits, codec, threads
from hf_sparsity.checkpoint.bitmask.codec import DTYPES, HEADER, checksum, pack, packed_bytes, read_header, unpack
from hf_sparsity.checkpoint.bitmask.kernels import compiled, kernels
from tests.checkpoint.bitmask.packed_bytes import digest, put, seal, string, tensor


@pytest.fixture(autouse=True, params=["compiled", "torch"], scope="module")
def loops(request):
    """Everything here holds for both forms of the loops over weights; on a CPU without BMI2 torch has to do."""
    if request.param == "torch":
        with pytest.MonkeyPatch.context() as patch:
            if importlib.util.find_spec("llvmlite") is not None:
                patch.setattr("llvmlite.binding.get_host_cpu_features", dict)
            forget_kernels()
            assert kernels(2) is None
            yield
        forget_kernels()
    elif kernels(2) is None:
        pytest.skip("no llvmlite, or no CPU that it is for")
    else:
        yield


def forget_kernels():
    kernels.cache_clear()
    compiled.cache_clear()


def sparse(shape, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    return weight.to(dtype)


def pruned(shape, kept, group, dtype=torch.float32):
    """Exactly `kept` of `group` along the last axis."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).view(-1, group)
    return weight.scatter(1, weight.abs().argsort(1)[:, : group - kept], 0).view(shape).to(dtype)


def same(a, b):
    """Equal bit for bit: also the sign of zero and what kind of NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def header(dtype, kept, group, swapped, shape, values):
    axes = len(shape)
    shape = (*shape, 0)[:3]
    fields = (1, dtype, kept, group, swapped, axes, *shape, values, bytes(8))
    return struct.pack("<4sBBBBBB6x3QQ8s8x", b"HFSP", *fields)


# ---- the bytes


def test_bitmask_byte_literal():
    # bf16: 1.0 is 0x3F80, -2.0 is 0xC000, -0.0 is 0x8000.
    weight = torch.tensor([[0, 1.0, 0, 0, -2.0], [0, -0.0, 0, 0, 1.0]], dtype=torch.bfloat16)
    expected = bytes.fromhex(
        "48465350 01 03 00 00 00 02 000000000000"  # HFSP, version 1, bfloat16, no code, not swapped, two axes
        "0200000000000000 0500000000000000 0000000000000000 0400000000000000"  # 2 x 5, 4 values
        "0000000000000000 0000000000000000"  # checksum, filled in below
        "5202000000000000"  # weights 1, 4, 6 and 9: bits 0b01010010, 0b10
        "803F 00C0 0080 803F"
    )
    assert string(pack(weight)) == seal(expected)
    assert same(unpack(tensor(seal(expected))), weight)


def test_codes_byte_literal():
    # Masks of 2:4 ascending: 0011, 0101, 0110, 1001, 1010, 1100 (lowest bit first: the left weight) are codes 0 to 5.
    weight = torch.tensor([[0, 5, 0, 7], [0, 0, 0, -9], [0, 0, 0, 0]], dtype=torch.int8)
    expected = header(11, 2, 4, 0, (3, 4), 6)
    # 1010 -> 4; 1000, filled in from the left to 1001 -> 3; 0000 to 0011 -> 0: 4 | 3 << 3 | 0 << 6 = 28.
    expected += bytes([28, 0, 0, 0, 0, 0, 0, 0]) + struct.pack("<6b2x", 5, 7, 0, -9, 0, 0)
    assert string(pack(weight, group=(2, 4))) == seal(expected)
    assert same(unpack(tensor(seal(expected))), weight)


def test_swapped_byte_literal():
    weight = torch.tensor([[0, 3.0], [1.0, 0]])  # stored [in, out]: the groups run down the columns
    expected = header(1, 1, 2, 1, (2, 2), 2) + bytes([0b01, 0, 0, 0, 0, 0, 0, 0]) + struct.pack("<2f", 1, 3)
    assert string(pack(weight, group=(1, 2), swapped=True)) == seal(expected)
    assert same(unpack(tensor(seal(expected))), weight)


def test_dtype_numbers_are_fixed():
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    assert [str(d)[6:] for d in DTYPES] == [*names.split(), "int64", "int32", "int16", "int8", "uint8"]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096 + 8])
def test_checksum_restated(size):
    raw = random.Random(size).randbytes(size)
    assert checksum(tensor(raw) if raw else torch.empty(0)) == digest(raw).hex()


# ---- round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    raw = torch.randint(0, 256, (37, 53 * dtype.itemsize), dtype=torch.uint8)
    raw = raw * (torch.rand(37, 53, 1) < 0.4).expand(37, 53, dtype.itemsize).reshape(37, -1)
    weight = raw.view(dtype)  # any bits: NaN of all kinds, infinities, -0.0
    assert same(unpack(pack(weight)), weight)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 64), (5, 65), (4, 3, 31), (700, 1000), (2, 1100, 1000)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_every_shape(shape, sparsity):
    weight = sparse(shape, sparsity, torch.bfloat16)
    assert same(unpack(pack(weight)), weight)


def test_tasks_and_threads_give_the_same_bytes(monkeypatch):
    weight = sparse((90, 1000), 0.6)
    expected = pack(weight)
    monkeypatch.setattr(bits, "CHUNK", 1024)
    for module in (threads, codec):
        monkeypatch.setattr(module, "TASK", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with torch.inference_mode():
        assert torch.equal(pack(weight), expected)
        assert same(unpack(expected), weight)
    coded = pruned((90, 1000), 2, 4)
    assert same(unpack(pack(coded, group=(2, 4))), coded)
    for shape in ((1, 1), (3, 5), (64, 64), (65, 127)):  # less than a task, or than the checksum's unit
        assert same(unpack(pack(few := sparse(shape, 0.5))), few) and codec.checksum(few)


class Changing(torch.Tensor):
    """Bytes that become others just before a certain operation on them; `calls_left`: the operations until then."""

    calls_left = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls_left -= 1
        if cls.calls_left == 0:
            cls.change()
        return super().__torch_function__(function, types, args, kwargs or {})

    @staticmethod
    def change():
        raise NotImplementedError


def test_a_mask_that_changes_while_it_is_read(monkeypatch):
    """As that of a mapped file may: what was checked is what is used, or values after the last would be read."""
    weight = sparse((20, 128), 0.6)  # whole words of bits, which could be used where they are
    packed = pack(weight)
    results = []
    for moment in range(1, 400):
        read = packed.clone()
        mask = read[HEADER : HEADER + weight.numel() // 8]
        monkeypatch.setattr(Changing, "change", lambda mask=mask: mask.fill_(255))
        Changing.calls_left = moment
        try:
            results.append(same(unpack(read.as_subclass(Changing)).as_subclass(torch.Tensor), weight))
        except ValueError:  # the damage was seen
            results.append(None)
        if Changing.calls_left > 0:
            break
    else:
        pytest.fail("it never came to an end")
    assert results[0] is None and results[-1] and False not in results


def test_views_and_unaligned_strings():
    weight = sparse((40, 60), 0.5).T[::2]
    assert same(unpack(pack(weight)), weight)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), pack(weight)])[3:]
    assert same(unpack(shifted), weight)
    assert same(unpack(pack(torch.nn.Parameter(weight))), weight)


@pytest.mark.parametrize("kept,group", [(n, m) for m in bits.GROUPS for n in range(1, m)])
@pytest.mark.parametrize("swapped", [False, True])
def test_every_code(kept, group, swapped):
    weight = pruned((3, 23, 40), kept, group, torch.bfloat16)
    weight[0, 2] = 0  # fewer than N kept
    stored = weight.transpose(-1, -2).contiguous() if swapped else weight
    packed = pack(stored, group=(kept, group), swapped=swapped)
    assert same(unpack(packed), stored)
    width = {(1, 2): 1, (1, 4): 2, (2, 4): 3, (3, 4): 2, (2, 8): 5, (3, 8): 6, (4, 8): 7}.get((kept, group))
    if read_header(packed).group and width:
        groups = weight.numel() // group
        padding = math.ceil(groups * width / 64) * 8
        assert len(packed) == HEADER + padding + -(-groups * kept * 2 // 8) * 8


def test_no_code_where_the_pattern_is_not():
    weight = pruned((8, 16), 2, 4)
    assert read_header(pack(weight, group=(2, 4))).group == (2, 4)
    weight[3, 4:8] = 1.0
    for group in ((2, 4), (2, 16), (4, 4), (0, 4)):
        packed = pack(weight, group=group)
        assert read_header(packed).group is None
        assert same(unpack(packed), weight)
    assert read_header(pack(sparse((4, 6), 0.9), group=(2, 4))).group is None  # 4 does not divide 6
    assert read_header(pack(sparse((64, 64), 0.95), group=(2, 4))).group is None  # mostly zeros: the bitmask is shorter


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_size(sparsity, dtype):
    weight = torch.zeros(512, 1000)
    weight.view(-1)[torch.randperm(512_000)[: round(512_000 * (1 - sparsity))]] = 1.0
    weight = weight.to(dtype)
    formula = 512_000 * (1 + dtype.itemsize * 8 * (1 - sparsity)) / 8
    assert formula <= len(pack(weight)) <= formula + HEADER + 14
    assert packed_bytes(weight) == len(pack(weight))


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="complex64"):
        pack(torch.zeros(2, 2, dtype=torch.complex64))
    for shape in ((4,), (0, 4), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="shape"):
            pack(torch.zeros(shape))


# ---- hostile and damaged strings

GOOD = string(pack(sparse((6, 20), 0.5)))
CODED = string(pack(pruned((6, 20), 2, 4), group=(2, 4)))
assert GOOD[6:8] == b"\0\0" and CODED[6:8] == b"\2\4"


HOSTILE = {
    "empty": b"",
    "shorter than a header": GOOD[:40],
    "cut": GOOD[:-8],
    "longer": seal(GOOD + bytes(8)),
    "magic": seal(put(GOOD, 0, b"HFSQ")),
    "version": seal(put(GOOD, 4, b"\2")),
    "dtype": seal(put(GOOD, 5, b"\x63")),
    "another dtype": seal(put(GOOD, 5, b"\3")),
    "one axis": seal(put(GOOD, 9, b"\1")),
    "nine axes": seal(put(GOOD, 9, b"\x09")),
    "swapped twice": seal(put(GOOD, 8, b"\2")),
    "reserved": seal(put(GOOD, 12, b"\1")),
    "third axis of two": seal(put(GOOD, 32, b"\1")),
    "shape overflows": seal(put(GOOD, 16, struct.pack("<2Q", 2**40, 2**40))),
    "shape wraps to the right size": seal(put(GOOD, 16, struct.pack("<2Q", 2**63 + 60, 2))),
    "negative as signed": seal(put(GOOD, 16, struct.pack("<q", -6))),
    "zero rows": seal(put(GOOD, 16, struct.pack("<Q", 0))),
    "more rows": seal(put(GOOD, 16, struct.pack("<Q", 7))),
    "more values": seal(put(GOOD, 40, struct.pack("<Q", 2**63))),
    "more values than weights": seal(put(GOOD, 40, struct.pack("<Q", 121))),
    "no code for 3:3": seal(put(GOOD, 6, b"\3\3")),
    "no code for 0:4": seal(put(GOOD, 6, b"\0\4")),
    "no code for 4:200": seal(put(GOOD, 6, b"\4\xc8")),
    "a bit more than values": seal(put(GOOD, HEADER, bytes([GOOD[HEADER] ^ 1]))),
    "a bit fewer than values": seal(put(GOOD, HEADER, bytes([GOOD[HEADER] & GOOD[HEADER] - 1]))),
    "all bits": seal(put(GOOD, HEADER, b"\xff" * 15)),
    "code 7 of 6": seal(put(CODED, HEADER, bytes([CODED[HEADER] | 7]))),
    "a checksum": put(GOOD, 50, bytes([GOOD[50] ^ 1])),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_strings(raw):
    assert same(unpack(tensor(seal(GOOD))), unpack(tensor(GOOD)))  # sealing alone is no offence
    with pytest.raises(ValueError, match="packed weight"):
        unpack(tensor(raw) if raw else torch.empty(0, dtype=torch.uint8))


def test_a_bit_after_the_last_weight():
    raw = string(pack(torch.ones(1, 3)))
    moved = put(raw, HEADER, b"\x0b")  # weights 0, 1 and 3 of 3: the number of bits is right
    with pytest.raises(ValueError, match="after the last weight"):
        unpack(tensor(seal(moved)))


def test_wrong_kind_of_tensor():
    for wrong in (tensor(GOOD).view(1, -1), tensor(GOOD).to(torch.int16), torch.zeros(100)):
        with pytest.raises(ValueError, match="not a packed weight"):
            unpack(wrong)


def test_every_bit_is_guarded():
    """Each single flipped bit, anywhere, is an error."""
    for good in (GOOD, CODED):
        for bit in range(len(good) * 8):
            raw = put(good, bit // 8, bytes([good[bit // 8] ^ 1 << bit % 8]))
            with pytest.raises(ValueError, match="packed weight"):
                unpack(tensor(raw))


def test_fuzzed_strings_never_crash():
    """Damage with a right checksum, as only a forger makes it: a ValueError, or a tensor of the promised shape."""
    rng = random.Random(0)
    seen = {"refused": 0, "read": 0}
    for _ in range(3000):
        raw = bytearray(rng.choice((GOOD, CODED)))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, rng.choice((HEADER, len(raw))))
            raw[at] = rng.choice((0, 1, 2, 4, 8, 255, rng.randrange(256)))
        try:
            weight = unpack(tensor(seal(bytes(raw))))
        except ValueError:
            seen["refused"] += 1
        else:
            seen["read"] += 1
            assert weight.nbytes < 10_000
            assert weight.shape == read_header(tensor(seal(bytes(raw)))).shape
    assert min(seen.values()) > 100


def test_another_version_is_called_that():
    """Not damage: another release can read it."""
    with pytest.raises(ValueError, match="layout version 2; this release"):
        unpack(tensor(seal(put(string(pack(torch.eye(4))), 4, b"\2"))))
