"""Importance to sparsities: the mapping of OWL and DLP restated, and the ends."""

import math
import statistics

import pytest

from hf_sparsity.core.allocation import (
    check_per,
    floored,
    groups_by_block_or_layer,
    linear_sparsities,
    normalized,
    standard_logs,
    usual_spread,
)


def test_the_mapping():
    values, target, spread = [3.0, -1.0, 2.0, 0.5], 0.65, 0.11
    u = [(v - min(values)) / (max(values) - min(values)) for v in values]
    expected = [1 - (2 * spread * x - 2 * spread * statistics.fmean(u) + 1 - target) for x in u]
    assert linear_sparsities(values, target, spread) == pytest.approx(expected, abs=1e-12)
    assert statistics.fmean(expected) == pytest.approx(target)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [1.0, float("nan")], [1.0, float("inf"), 2.0]])
def test_nothing_to_tell_apart(values):
    assert normalized(values) == [0.0] * len(values)
    assert linear_sparsities(values, 0.3, 0.1) == [0.3] * len(values)
    assert linear_sparsities([1.0, 2.0], 0.3, 0.0) == [0.3, 0.3]


def test_none_is_left_dense():
    assert linear_sparsities([0.0, 0.0, 1.0], 0.2, 0.4)[2] == 0.01


def test_the_usual_spread():
    """BeiYazi0/LSA, layersp/blk.py: the list that the target's first digit chooses from."""
    published = {0.5: 0.04, 0.6: 0.1, 0.7: 0.15, 0.8: 0.12}
    assert {target: usual_spread(target) for target in published} == pytest.approx(published)
    assert usual_spread(0.65) == pytest.approx(0.125) and usual_spread(0.2) == 0.04 and usual_spread(0.95) == 0.12


def test_units():
    measures = [{"a": 1.0, "b": 4.0}, {}, {"c": 0.1}]
    assert groups_by_block_or_layer(measures, "block") == [(("a", "b"), 2.5), (("c",), 0.1)]
    assert groups_by_block_or_layer(measures, "layer") == [(("a",), 1.0), (("b",), 4.0), (("c",), 0.1)]
    shared = 0.1 + 0.2
    assert groups_by_block_or_layer([dict.fromkeys("abcdefg", shared)], "block")[0][1] == shared, (
        "a block's own measure to the bit"
    )
    with pytest.raises(ValueError, match="per='row' is unknown; use 'block' or 'layer'"):
        check_per("row")


def test_standard_logs():
    values = [1.0, 10.0, 1000.0]
    z = standard_logs(values)
    assert sum(z) == pytest.approx(0, abs=1e-12) and statistics.pstdev(z) == pytest.approx(1)
    assert (z[1] - z[0]) * 2 == pytest.approx(z[2] - z[1])
    assert standard_logs([5.0, 5.0]) == [0.0, 0.0]


def test_floored():
    assert floored([0.0, 3.0, 2.0, 1e-13]) == [2.0, 3.0, 2.0, 2.0]
    assert floored([0.0, 0.0]) == [1.0, 1.0] and math.isfinite(sum(standard_logs(floored([0.0, 7.0]))))
