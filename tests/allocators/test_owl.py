"""OWL and uniform: the authors' densities, and the ends they did not handle."""

import json
from pathlib import Path

import pytest
import torch

from hf_sparsity.algorithm import NORMS, Layer, Pruner
from hf_sparsity.allocators.owl import OWL
from hf_sparsity.allocators.uniform import Uniform
from hf_sparsity.core.stats import InputStats

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/goldens/llama-tiny/alloc/owl_70.json").read_text())


class Unused(Pruner):
    """OWL must not ask the pruner for anything."""

    name = "unused"

    def scores(self, layer):
        raise AssertionError("OWL always scores as Wanda does")


def measures_of(percents, layers=("q", "up")):
    return [{f"{i}.{layer}": d for layer in layers} for i, d in enumerate(percents)]


def by_block(sparsities, layers=("q", "up")):
    for layer in layers:
        assert [sparsities[k] for k in sparsities if k.endswith("." + layer)] == [*sparsities.values()][:: len(layers)]
    return [*sparsities.values()][:: len(layers)]


def sizes_of(measures):
    return {name: 1000 * (1 + len(name) % 3) for block in measures for name in block}


def layer(name, weight, inputs):
    stats = InputStats(frozenset({NORMS}))
    stats.add(inputs, sequences=2)
    return Layer(name, weight, stats=stats)


def test_golden_densities():
    measures = measures_of(json.loads(json.dumps(GOLDEN["outlier_percent"])))
    found = by_block(OWL(outlier=5.0, spread=0.08).assign(measures, sizes_of(measures), 0.7))
    assert found == pytest.approx(GOLDEN["sparsity"], abs=1e-12)
    assert [1 - s for s in found] == pytest.approx(GOLDEN["density"], abs=1e-12)


def test_golden_groups():
    golden = GOLDEN["structure_5of8_M6_L2"]
    measures = measures_of(golden["outlier_percent"])
    found = OWL(outlier=6.0, group_spread=2.0).assign(measures, sizes_of(measures), 5 / 8, group=8)
    assert [8 * s for s in by_block(found)] == golden["n_pruned_per_8"]


def test_the_measure_is_that_of_wandas_scores_over_the_block():
    torch.manual_seed(0)
    shared = torch.randn(20, 16) * torch.logspace(-1, 1, 16)
    block = {
        "q": layer("q", torch.randn(8, 16), shared),
        "up": layer("up", torch.randn(24, 16).bfloat16(), shared),
        "down": layer("down", torch.randn(16, 24), torch.randn(20, 24)),
    }
    scores = []
    for one, x in zip(block.values(), (shared, shared, None), strict=True):
        norms = one.stats.norms if x is None else (x.square().sum(0) / 2).sqrt()
        scores.append((one.weight.float().abs() * norms).flatten())
    flat = torch.cat(scores)
    expected = 100 * float((flat > 2 * flat.mean()).sum()) / flat.numel()
    assert expected > 0
    assert OWL(outlier=2.0).measure(block, Unused()) == pytest.approx(dict.fromkeys(block, expected), abs=1e-9)


def test_missing_norms_are_named():
    with pytest.raises(ValueError, match="down: owl needs the norms"):
        OWL().measure({"down": Layer("down", torch.randn(4, 4))}, Unused())


def test_the_mean_is_over_blocks_and_the_range_twice_the_spread():
    measures = measures_of([1.0, 2.0, 9.0, 4.5, 3.0])
    found = by_block(OWL(spread=0.1).assign(measures, sizes_of(measures), 0.6))
    assert sum(found) / 5 == pytest.approx(0.6, abs=1e-12)
    assert max(found) - min(found) == pytest.approx(0.2, abs=1e-12)
    assert found.index(min(found)) == 2 and found.index(max(found)) == 0


def test_a_sparsity_of_zero_or_less_becomes_a_hundredth():
    found = by_block(OWL(spread=0.4).assign(measures_of([0.0, 0.0, 10.0]), {}, 0.3))
    assert found[2] == 0.01


@pytest.mark.parametrize("percents", [[2.5], [2.5, 2.5, 2.5], [0.0, 0.0], [1.0, float("nan"), 2.0]])
def test_nothing_to_tell_blocks_apart_gives_uniform(percents):
    for target in (0.0, 0.005, 0.7):
        assert set(OWL().assign(measures_of(percents), {}, target).values()) == {target}
    assert set(OWL().assign(measures_of(percents), {}, 0.75, group=8).values()) == {0.75}


@pytest.mark.parametrize("target", [0.1, 0.875, 0.95])
def test_groups_keep_at_least_one_and_prune_no_less_than_none(target):
    found = OWL(group_spread=6.0).assign(measures_of([0.0, 1.0, 9.0, 10.0]), {}, target, group=8)
    assert all(0 <= s <= 0.875 and 8 * s == round(8 * s) for s in found.values())


def test_groups_round_half_to_even():
    # Shares 0, 1/2, 1 of spread 1, less the mean: -1/2, 0, 1/2; all round to 0.
    assert set(OWL(group_spread=1.0).assign(measures_of([0.0, 1.0, 2.0]), {}, 0.5, group=8).values()) == {0.5}


def test_blocks_without_prunable_layers_do_not_count():
    measures = measures_of([1.0, 2.0])
    assert OWL().assign([{}, *measures, {}], {}, 0.7) == OWL().assign(measures, {}, 0.7)
    assert OWL().measure({}, Unused()) == {}


def test_uniform_is_the_target_to_the_bit():
    measures = measures_of([0.0, 0.0])
    assert Uniform().assign(measures, sizes_of(measures), 0.1 + 0.2) == dict.fromkeys(sizes_of(measures), 0.1 + 0.2)
