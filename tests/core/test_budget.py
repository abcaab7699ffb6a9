"""The global sparsity is met exactly, counted in weights."""

import math
import random
import sys

import pytest

from hf_sparsity.core.budget import HIGHEST, Curve, fill, mean_sparsity, meet, meet_groups

TARGETS = (0.0, 0.3, 0.5, 0.7, 0.95)


def random_case(seed, layers=40):
    """Sparsities (some outside [0, 1]) and unequal sizes."""
    draw = random.Random(seed)
    names = [f"model.layers.{i}.proj" for i in range(layers)]
    sparsities = {n: draw.gauss(0.7, draw.choice((0.01, 0.1, 0.4))) for n in names}
    return sparsities, {n: draw.choice((128, 1000, 4096, 99_991)) for n in names}


def slow_meet_groups(sparsities, sizes, target, group):
    """The definition, one layer at a time over all layers; integers as in the budget."""
    ideal = {n: (1 - s) * group for n, s in sparsities.items()}
    kept = {n: min(max(round(k), 1), group) for n, k in ideal.items()}
    budget = math.floor((1 - target) * group * sum(sizes.values()) + 1e-6)

    def used():
        return sum(kept[n] * sizes[n] for n in kept)

    while used() > budget and any(k > 1 for k in kept.values()):
        kept[max((n for n in kept if kept[n] > 1), key=lambda n: (kept[n] - ideal[n], sizes[n], n))] -= 1
    while able := [n for n in kept if kept[n] < group and used() + sizes[n] <= budget]:
        kept[max(able, key=lambda n: (ideal[n] - kept[n], sizes[n], n))] += 1
    return {n: 1 - k / group for n, k in kept.items()}


def test_the_mean_counts_weights():
    assert mean_sparsity({"a": 0.5, "b": 0.9}, {"a": 300, "b": 100}) == pytest.approx(0.6, abs=1e-15)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(5))
def test_meet_is_exact_and_within_bounds(target, seed):
    sparsities, sizes = random_case(seed)
    met = meet(sparsities, sizes, target)
    assert list(met) == list(sparsities)
    assert mean_sparsity(met, sizes) == pytest.approx(target, abs=1e-9)
    assert all(0 <= s <= HIGHEST for s in met.values())


def test_meet_keeps_the_order_and_the_distances_of_free_layers():
    sparsities, sizes = {"a": 0.5, "b": 0.6, "c": 1.4}, {"a": 10, "b": 20, "c": 30}
    met = meet(sparsities, sizes, 0.7)
    assert met["c"] == HIGHEST
    assert met["b"] - met["a"] == pytest.approx(0.1)


def test_meet_leaves_what_fits_to_the_bit():
    sparsities = {"a": 0.71, "b": 0.69000000000000006}
    assert meet(sparsities, {"a": 5, "b": 5}, 0.7) == sparsities


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_meet_survives_what_formulas_give_on_constant_measures(bad):
    met = meet({"a": bad, "b": 0.7, "c": 0.6}, {"a": 10, "b": 20, "c": 30}, 0.7)
    assert mean_sparsity(met, {"a": 10, "b": 20, "c": 30}) == pytest.approx(0.7, abs=1e-9)
    if math.isnan(bad):
        assert set(met.values()) == {0.7}


def test_meet_goes_above_the_cap_only_when_the_target_does():
    assert meet({"a": 0.5, "b": 1.5}, {"a": 1, "b": 1}, 0.999) == {"a": 0.999, "b": 0.999}


@pytest.mark.parametrize("group", [4, 8, 16])
@pytest.mark.parametrize("target", (0.0, 0.3, 0.5, 0.7))
@pytest.mark.parametrize("seed", range(5))
def test_groups_never_keep_more_and_miss_less_than_the_smallest_layer(seed, target, group):
    sparsities, sizes = random_case(seed)
    met = meet_groups(sparsities, sizes, target, group)
    kept = {n: round((1 - s) * group) for n, s in met.items()}
    assert all(1 <= kept[n] <= group and met[n] == 1 - kept[n] / group for n in met)
    slack = (1 - target) * group * sum(sizes.values()) - sum(kept[n] * sizes[n] for n in kept)
    assert slack >= -1e-5
    assert slack < min(sizes[n] for n in kept if kept[n] < group) if target else slack == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.625, 0.8, 0.97])
@pytest.mark.parametrize("seed", range(6))
def test_groups_equal_the_definition(seed, target):
    sparsities, sizes = random_case(seed, layers=25)
    if seed % 3:  # many ties, which the size decides, or the name
        sparsities = {n: round(s, 1) for n, s in sparsities.items()}
    if seed % 3 == 1:
        sizes = dict.fromkeys(sizes, 512)
    assert meet_groups(sparsities, sizes, target, 8) == slow_meet_groups(sparsities, sizes, target, 8)


def test_exact_groups_stay():
    sparsities = {"a": 0.5, "b": 0.75, "c": 0.25}
    assert meet_groups(sparsities, {"a": 8, "b": 8, "c": 8}, 0.5, 8) == sparsities


def test_groups_keep_one_where_the_target_leaves_less():
    assert meet_groups({"a": 0.99, "b": 0.99}, {"a": 8, "b": 16}, 0.99, 8) == {"a": 0.875, "b": 0.875}


def calls_of(function, *args):
    """How many functions, Python's own included, are called and generators resumed while it runs."""
    calls = [0]

    def count(frame, event, argument):
        calls[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return calls[0]


def test_groups_of_a_model_with_many_experts_take_a_heap():
    """The work grows with the number of layers; scanning all layers for each step, with its square."""
    few, many = (calls_of(meet_groups, *random_case(0, layers=layers), 0.7, 8) for layers in (500, 4000))
    assert few < many < 12 * few
    scanned = [calls_of(slow_meet_groups, *random_case(0, layers=layers), 0.7, 8) for layers in (50, 400)]
    assert scanned[1] > 24 * scanned[0]


CURVE = Curve([0.0, 0.5, 0.6, 0.9], [1.0, 0.8, 0.85, 0.4])


def test_a_curve_is_straight_between_its_points():
    assert [CURVE.at(s) for s in (0, 0.25, 0.5, 0.55, 0.9, 0.95)] == pytest.approx([1, 0.9, 0.8, 0.825, 0.4, 0.4])


def test_a_curve_reaches_a_level_at_the_first_crossing_behind_the_floor():
    assert CURVE.reach(0.9, 0.0, 0.95) == pytest.approx(0.25)
    assert CURVE.reach(0.9, 0.4, 0.95) == 0.4
    assert CURVE.reach(0.81, 0.52, 0.95) == 0.52
    assert CURVE.reach(0.81, 0.55, 0.95) == pytest.approx(0.6 + 0.3 * 0.04 / 0.45)
    assert CURVE.reach(0.1, 0.55, 0.95) == 0.95


@pytest.mark.parametrize("target", [0.55, 0.7, 0.8, 0.89, 0.9])
def test_filling_meets_the_target_even_across_jumps(target):
    flat, rising = Curve([0.0, 0.9], [0.5, 0.5]), Curve([0.0, 0.9], [0.3, 0.6])
    sizes, floor = [10, 30, 20], [0.5, 0.55, 0.5]
    filled = fill([CURVE, flat, rising], sizes, target, floor=floor, cap=0.9)
    assert math.fsum(n * s for n, s in zip(sizes, filled, strict=False)) == pytest.approx(target * 60, abs=1e-9)
    assert all(low <= s <= 0.9 + 1e-12 for low, s in zip(floor, filled, strict=False))


def test_filling_levels_redundancy():
    steep, gentle = Curve([0.0, 1.0], [1.0, 0.0]), Curve([0.0, 1.0], [0.8, 0.3])
    a, b = fill([steep, gentle], [1, 1], 0.5, floor=[0, 0], cap=0.95)
    assert 1 - a == pytest.approx(0.8 - 0.5 * b)
    assert a + b == pytest.approx(1)
