"""Arbitrary and mutated input to what reads foreign data: a value, or a ValueError that says why; nothing else."""

from __future__ import annotations

import copy
import struct

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparsity.checkpoint.bitmask.codec import HEADER, pack, read_header, unpack
from hf_sparsity.plan import LayerPlan, LayerReport, Plan, Report
from tests.checkpoint.bitmask.packed_bytes import seal, tensor

quick = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
WEIGHT = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 4], [5, 0, 0, 6, 0, 7, 8, 0]], dtype=torch.int16)
STRINGS = [bytes(pack(WEIGHT, group=group).tolist()) for group in (None, (2, 4))]
NUMBERS = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**32, 2**40, 2**61, 2**62, 2**63, 2**64 - 1]))
PLAN = Plan(
    config={"sparsity": 0.5, "pattern": "unstructured"},
    layers={"a.up": LayerPlan(0.5, 64)} | {f"b.experts[{i}]": LayerPlan(0.5, 8, measure=1.5 + i) for i in range(4)},
).to_dict()
REPORT = Report(0.5, {"a.up": LayerReport(32, 64, 0.5, error=0.1, tokens=9)}, skipped={"b": "why"}).to_dict()
_KEYS = [
    "version",
    "config",
    "layers",
    "sparsity",
    "size",
    "pattern",
    "measure",
    "x[0:4]",
    "zeros",
    "planned",
    "target",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0.5 0.5", "2:4", "*:8", "-", "a[0:3]", "a[0:999999]", "unstructured"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=5), inner),
    max_leaves=8,
)


def only_value_errors(read, data):
    try:
        return read(data)
    except ValueError:
        return None


def check(raw: bytes) -> None:
    """A ValueError, or a tensor of the promised shape that takes no more than 64 times the bytes of the string."""
    packed = tensor(raw) if raw else torch.empty(0, dtype=torch.uint8)
    weight = only_value_errors(unpack, packed)
    if weight is not None:
        assert weight.shape == read_header(packed).shape and weight.dtype == read_header(packed).dtype
        assert weight.nbytes <= 64 * len(raw)


@quick
@given(st.binary(max_size=200))
def test_any_bytes(raw):
    check(raw)
    check(seal(STRINGS[0][:HEADER] + raw))


@quick
@given(
    st.tuples(*[st.integers(0, 255)] * 5),
    st.tuples(*[NUMBERS] * 4),
    st.binary(max_size=64),
)
def test_any_header(small, numbers, rest):
    """Every field of the header, from small to beyond 64 bits, with a right checksum."""
    code, kept, group, swapped, axes = small
    fields = (code % 15, kept % 9, group % 9, swapped % 3, axes % 5)
    check(seal(struct.pack("<4sBBBBBB6x3QQ8s8x", b"HFSP", 1, *fields, *numbers, bytes(8)) + rest))


@quick
@given(
    st.sampled_from(STRINGS), st.lists(st.tuples(st.integers(4, 200), st.integers(0, 255)), max_size=4), st.integers()
)
def test_mutated_strings(raw, changes, length):
    raw = bytearray(raw)
    for at, value in changes:
        raw[at % len(raw)] = value
    check(seal(bytes(raw)))
    check(bytes(raw[: length % (len(raw) + 1)]))


@quick
@given(JSON)
def test_any_json(data):
    for read in (Plan.from_dict, Report.from_dict):
        only_value_errors(read, data)
    only_value_errors(Plan.from_dict, {"version": 1, "config": {"sparsity": 0.5}, "layers": data})
    only_value_errors(Report.from_dict, REPORT | {"layers": data})


@st.composite
def mutated(draw, valid):
    """A valid object with up to three places, at any depth, replaced or removed."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or draw(st.integers(0, 3)) == 0:
                if draw(st.booleans()):
                    place[key] = draw(JSON)
                else:
                    del place[key]
                break
            place = place[key]
    return data


@quick
@given(mutated(PLAN), mutated(REPORT))
def test_mutated_plans_and_reports(plan, report):
    made = only_value_errors(Plan.from_dict, plan)
    if made is not None:  # what was read can be written, and read again
        assert Plan.from_dict(made.to_dict()).layers.keys() == made.layers.keys()
        only_value_errors(Plan.check_target, made)
    only_value_errors(Report.from_dict, report)


def test_valid_ones_are_read():
    assert Plan.from_dict(PLAN).to_dict() == PLAN and Report.from_dict(REPORT).to_dict() == REPORT
    for raw in STRINGS:
        assert torch.equal(unpack(tensor(raw)), WEIGHT)
