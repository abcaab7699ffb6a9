"""ATP: the authors' progression, and the choice of its slope by a loss that we know."""

from itertools import pairwise

import pytest

from hf_sparsity.algorithm import LOSS, ModelOracle
from hf_sparsity.allocators.atp import ATP
from hf_sparsity.core.budget import mean_sparsity


def blocks_of(count, layers=("q", "up")):
    return [{f"{i}.{layer}": None for layer in layers} for i in range(count)]


def sizes_of(blocks, uneven=False):
    return {n: 100 * (1 + 2 * (uneven and i < 2)) for i, b in enumerate(blocks) for n in b}


def slope(sparsities):
    return sparsities["1.q"] - sparsities["0.q"]


def test_golden_progression():
    """wzhuang-xmu/ATP main.py: first = S - beta (L - 1) / 2, then steps of beta."""
    length, beta, target = 32, 0.012, 0.7
    first = target - (beta * (length - 1)) / 2
    found = ATP(beta=beta).assign(blocks_of(length), {}, target)
    assert [found[f"{i}.q"] for i in range(length)] == pytest.approx(
        [first + i * beta for i in range(length)], abs=1e-12
    )
    assert all(found[f"{i}.q"] == found[f"{i}.up"] for i in range(length))


def test_the_slope_with_the_least_loss_is_taken():
    blocks = blocks_of(32)
    asked = []

    def loss(sparsities):
        asked.append(slope(sparsities))
        return (slope(sparsities) - 0.0125) ** 2

    found = ATP().assign(blocks, sizes_of(blocks), 0.7, probe=ModelOracle(loss=loss))
    assert asked == pytest.approx([0.002 * k for k in range(10)])  # 0.6 / 31 = 0.0194: the published 9, and uniform
    assert slope(found) == pytest.approx(0.012)


def test_uniform_can_win_and_wins_ties():
    blocks = blocks_of(8)
    for loss in (slope, lambda sparsities: 1.0):
        assert set(ATP().assign(blocks, sizes_of(blocks), 0.6, probe=ModelOracle(loss=loss)).values()) == {0.6}


@pytest.mark.parametrize("trials", [1, 4, 10])
def test_few_blocks_have_many_slopes_and_only_so_many_are_tried(trials):
    blocks, asked = blocks_of(4), []
    loss = lambda sparsities: asked.append(slope(sparsities)) or 0.0  # noqa: E731
    ATP(trials=trials).assign(blocks, sizes_of(blocks), 0.5, probe=ModelOracle(loss=loss))
    assert asked[0] == 0 and 2 <= len(asked) <= trials + 1
    apart = [b - a for a, b in pairwise(asked)]
    assert apart == pytest.approx([apart[0]] * len(apart)) and 1 / 3 - apart[0] < asked[-1] <= 1 / 3


@pytest.mark.parametrize("group", [None, 8])
def test_candidates_are_judged_as_they_will_be_made(group):
    """At the target by weights, within [0, 1), in whole weights of a group, though the blocks are uneven."""
    blocks, asked = blocks_of(6), []
    sizes = sizes_of(blocks, uneven=True)
    loss = lambda sparsities: asked.append(sparsities) or 0.0  # noqa: E731
    ATP().assign(blocks, sizes, 0.75, group=group, probe=ModelOracle(loss=loss))
    assert len(asked) > 2
    for candidate in asked:
        assert all(0 <= s < 1 for s in candidate.values())
        assert mean_sparsity(candidate, sizes) == pytest.approx(0.75, abs=1e-6 if group is None else 0.04)
        assert group is None or all(8 * s == round(8 * s) for s in candidate.values())


def test_a_given_slope_needs_no_data():
    assert ATP(beta=0.01).needs == frozenset() and ATP().needs == {LOSS}
    assert slope(ATP(beta=0.0).assign(blocks_of(3), {}, 0.6)) == 0
    with pytest.raises(ValueError, match="plan with calibration data, or give beta"):
        ATP().assign(blocks_of(3), sizes_of(blocks_of(3)), 0.6)


def test_one_block_and_no_target_leave_no_choice():
    for blocks, target in ((blocks_of(1), 0.7), (blocks_of(5), 0.0), ([{}, *blocks_of(1), {}], 0.3)):
        assert set(ATP().assign(blocks, sizes_of(blocks), target).values()) == {target}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"beta=0.02 is too steep for 32 blocks at sparsity 0.7; use at most 0.01935"):
        ATP(beta=0.02).assign(blocks_of(32), {}, 0.7)
    for options in ({"beta": -0.01}, {"beta": 1.0}, {"step": 0.0}, {"trials": 0}, {"steps": 300}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ATP(**options)
