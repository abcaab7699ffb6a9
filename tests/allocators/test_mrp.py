"""MRP, reconstructed: the greedy loop against water-filling, and the table against pruning and counting.

The blocks are `|weight| * norm` with lognormal norms, whose spread makes the tail: the later a block,
the more outliers it has.
"""

import functools
import json
import logging
from dataclasses import replace

import pytest
import torch

from hf_sparsity.algorithm import NORMS, REMEASURE, SCORES, Layer, ModelOracle, Pattern, Pruner
from hf_sparsity.allocators.mrp import MRP, rank_correlation
from hf_sparsity.core import masks
from hf_sparsity.core.budget import mean_sparsity
from hf_sparsity.core.stats import InputStats

BLOCKS = 8


class ByRow(Pruner):
    name = "by-row"

    def scores(self, layer):
        return layer.weight.abs()


BY_ROW, UNSTRUCTURED = ByRow(), Pattern()


class ByLayer(ByRow):
    name = "by-layer"

    def mask(self, layer, scores):
        if layer.pattern.group is not None:
            return super().mask(layer, scores)
        return masks.keep_layer(scores, layer.sparsity)


@functools.cache
def block_of(index, *, tail, seed=0, scale=1.0, shapes=((48, 256), (96, 128))):
    torch.manual_seed(1000 * seed + index)
    block = {}
    for k, (rows, columns) in enumerate(shapes):
        scores = scale * torch.randn(rows, columns).abs() * (torch.randn(columns) * tail).exp()
        block[f"{index}.{k}"] = Layer(f"{index}.{k}", scores, scores=scores)
    return block


def model(seed=0, **options):
    return [block_of(i, tail=0.5 + 0.08 * i, seed=seed, **options) for i in range(BLOCKS)]


def sizes_of(blocks):
    return {name: layer.weight.numel() for block in blocks for name, layer in block.items()}


def measured(method, blocks, pruner=BY_ROW):
    return [method.measure(block, pruner) for block in blocks]


@functools.cache
def standard(seed=0):
    """Blocks, their sizes, and what MRP() measures."""
    blocks = model(seed)
    return blocks, sizes_of(blocks), measured(MRP(), blocks)


def of_blocks(sparsities):
    """One sparsity a block; all its layers must share it."""
    found = {}
    for name, s in sparsities.items():
        assert found.setdefault(name.split(".")[0], s) == s
    return [*found.values()]


def nor(block, sparsity, multiple, *, pruner=BY_ROW, dense=False, pattern=UNSTRUCTURED):
    """The definition: prune with the pruner, concatenate, average, count."""
    whole = torch.cat([layer.scores.flatten().double() for layer in block.values()])
    keep = [pruner.mask(replace(la, sparsity=sparsity, pattern=pattern), la.scores) for la in block.values()]
    keep = torch.cat([k.flatten() for k in keep]) if sparsity else torch.ones(len(whole), dtype=torch.bool)
    mean = whole.mean() if dense else (whole * keep).sum() / len(whole)
    return 1 - float((whole[keep] > multiple * mean).sum()) / (int(keep.sum()) if dense else len(whole))


def water_filled(tables, weights, target, start, cap):
    """The oracle, by brute force on a fine grid: the smallest s of each block with NOR <= v, v bisected."""
    grid = torch.linspace(start, cap, 4001, dtype=torch.float64)
    curves = []
    for table in tables:
        s, values = (torch.tensor(x, dtype=torch.float64) for x in (table["sparsity"], table["nor"]["7"]))
        i = torch.searchsorted(s, grid, right=True).clamp(1, len(s) - 1)
        curves.append(values[i - 1] + (grid - s[i - 1]) / (s[i] - s[i - 1]) * (values[i] - values[i - 1]))

    def at(level):
        return [float(grid[(c <= level).int().argmax()]) if c.min() <= level else cap for c in curves]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = sum(w * s for w, s in zip(weights, at(middle), strict=False)) / sum(weights)
        low, high = (low, middle) if mean < target else (middle, high)
    return at(high)


@pytest.mark.parametrize("reading", ["D1", "D4"])
@pytest.mark.parametrize("pruner, every", [(ByRow(), 0.01), (ByLayer(), 0.05)])
def test_the_table_equals_pruning_and_counting(pruner, every, reading):
    block = block_of(3, tail=1.0)
    table = MRP(outlier=4.0, reading=reading).measure(block, pruner)["3.0"]
    assert table["sparsity"] == pytest.approx([i * every for i in range(len(table["sparsity"]))])
    assert table["sparsity"][-1] == 0.95
    expected = [nor(block, s, 4.0, pruner=pruner, dense=reading == "D4") for s in table["sparsity"]]
    assert table["nor"]["4"] == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 10


def test_the_table_of_groups_has_their_multiples():
    block = {name: replace(layer, pattern=Pattern.parse("*:8")) for name, layer in block_of(3, tail=1.0).items()}
    table = MRP(outlier=4.0).measure(block, ByLayer())["3.1"]
    assert table["sparsity"] == [i / 8 for i in range(8)]
    expected = [nor(block, i / 8, 4.0, pattern=Pattern(8 - i, 8)) for i in range(8)]
    assert table["nor"]["4"] == pytest.approx(expected, abs=1e-12)


def test_the_coarser_table_of_other_masks_leads_to_the_same_plan():
    _, sizes, fine = standard()

    def thinned(table):
        return table | {"sparsity": table["sparsity"][::5], "nor": {m: v[::5] for m, v in table["nor"].items()}}

    coarse = [{name: thinned(table) for name, table in block.items()} for block in fine]
    plans = [of_blocks(MRP().assign(m, sizes, 0.7)) for m in (fine, coarse)]
    assert plans[0] == pytest.approx(plans[1], abs=0.025)


@pytest.mark.parametrize("target", [0.0, 0.05, 0.3, 0.5, 0.685, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("reading", ["D1", "D4"])
@pytest.mark.parametrize("shapes", [((48, 256), (96, 128)), ((8, 16), (16, 8))])
def test_the_mean_is_exact_and_blocks_stay_within_bounds(target, reading, shapes):
    blocks = model(shapes=shapes)
    blocks[2] = block_of(2, tail=0.6, shapes=((200, 256),))  # unequal sizes
    found = MRP(reading=reading).assign(measured(MRP(reading=reading), blocks), sizes_of(blocks), target)
    assert set(found) == set(sizes_of(blocks))
    assert mean_sparsity(found, sizes_of(blocks)) == pytest.approx(target, abs=1e-9)
    start, cap = max(0, target - 0.15), min(0.95, target + 0.2)
    assert all(start - 1e-9 <= s <= cap + 1e-9 for s in of_blocks(found))
    if target == 0:
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize("target", [0.0, 0.7, 0.95])
def test_a_single_block_gets_the_target(target):
    blocks = model()[:1]
    found = MRP().assign(measured(MRP(), blocks), sizes_of(blocks), target)
    assert of_blocks(found) == pytest.approx([target], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_redundancy_becomes_uniform(seed):
    blocks, sizes, measures = standard(seed)
    found = of_blocks(MRP().assign(measures, sizes, 0.7))
    free = [i for i, s in enumerate(found) if 0.5501 < s < 0.8999]
    assert len(free) >= 5
    after = torch.tensor([nor(blocks[i], found[i], 7.0) for i in free])
    before = torch.tensor([nor(blocks[i], 0.7, 7.0) for i in free])
    assert after.std() <= 0.3 * before.std()


@pytest.mark.parametrize("step, tolerance", [(0.01, 0.02), (0.001, 0.002)])
@pytest.mark.parametrize("seed", range(3))
def test_the_loop_tends_to_water_filling(seed, step, tolerance):
    blocks, sizes, measures = standard(seed)
    weights = [sum(layer.weight.numel() for layer in block.values()) for block in blocks]
    oracle = water_filled([next(iter(m.values())) for m in measures], weights, 0.7, 0.55, 0.9)
    found = of_blocks(MRP(step=step).assign(measures, sizes, 0.7))
    assert found == pytest.approx(oracle, abs=tolerance)


def test_permuting_blocks_permutes_the_plan():
    _, sizes, measures = standard()
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    found = MRP().assign(measures, sizes, 0.7)
    other = MRP().assign([measures[i] for i in order], sizes, 0.7)
    assert other == pytest.approx(found, abs=1e-9)


def test_scaling_a_blocks_scores_changes_nothing():
    _, sizes, measures = standard()
    scaled = [*measures]
    scaled[3] = MRP().measure(block_of(3, tail=0.5 + 0.08 * 3, scale=1024.0), ByRow())
    assert scaled[3] == measures[3]
    assert MRP().assign(scaled, sizes, 0.7) == MRP().assign(measures, sizes, 0.7)


@pytest.mark.parametrize("target", [0.5, 0.7, 0.8])
def test_identical_blocks_stay_uniform(target):
    blocks = []
    for i in range(5):
        same = block_of(0, tail=0.8)
        blocks.append({f"{i}.{k}": layer for k, layer in enumerate(same.values())})
    found = of_blocks(MRP().assign(measured(MRP(), blocks), sizes_of(blocks), target))
    assert found == pytest.approx([target] * 5, abs=0.01)


def test_of_equals_the_later_block_goes_first():
    table = {"sparsity": [0.0, 0.95], "nor": {"7": [1.0, 0.5], "10": [1.0, 0.5]}, "outliers": 0.0}
    found = MRP(start=0.5, step=0.08).assign([{"a": table}, {"b": table}, {"c": table}], {"a": 1, "b": 1, "c": 1}, 0.54)
    assert [*found.values()] == pytest.approx([0.5, 0.54, 0.58])


def test_a_block_that_does_not_fall_is_frozen_and_the_cap_holds():
    falling = {"sparsity": [0.0, 0.95], "nor": {"7": [0.9, 0.1]}, "outliers": 0.0}
    rising = {"sparsity": [0.0, 0.5, 0.95], "nor": {"7": [0.95, 0.9, 1.0]}, "outliers": 0.0}
    method = MRP(outlier=7, start=0.5, step=0.01, cap=0.725)
    found = method.assign([{"a": falling}, {"b": rising}], {"a": 1, "b": 1}, 0.6)
    assert [*found.values()] == pytest.approx([0.69, 0.51])
    # Once the first is at its cap too, the rest is poured into the frozen one.
    found = method.assign([{"a": falling}, {"b": rising}], {"a": 1, "b": 1}, 0.7)
    assert [*found.values()] == pytest.approx([0.725, 0.675])


@pytest.mark.parametrize("multiple, target", [(5.0, 0.5), (7.0, 0.7), (None, 0.7), (None, 0.8)])
def test_blocks_with_more_outliers_keep_more(multiple, target, caplog):
    blocks, method = model(), MRP(outlier=multiple)
    measures = measured(method, blocks)
    found = of_blocks(method.assign(measures, sizes_of(blocks), target))
    outliers = [1 - nor(block, 0, multiple or 7.0) for block in blocks]
    assert rank_correlation(found, outliers) < -0.9
    assert not caplog.records


def test_it_warns_when_the_multiple_inverts_the_order(caplog):
    blocks, method = model(), MRP(outlier=3.0)
    with caplog.at_level(logging.WARNING):
        found = of_blocks(method.assign(measured(method, blocks), sizes_of(blocks), 0.7))
    assert rank_correlation(found, [1 - nor(block, 0, 3.0) for block in blocks]) > 0.8
    assert "raise `outlier`" in caplog.text


def test_measures_survive_json_and_give_one_number():
    blocks, sizes, measures = standard()
    again = json.loads(json.dumps(measures))
    assert MRP().assign(again, sizes, 0.8) == MRP().assign(measures, sizes, 0.8)
    assert MRP().number(again[4]["4.0"]) == pytest.approx(nor(blocks[4], 0, 7.0), abs=1e-12)
    assert MRP().number(None) is None


def test_the_multiple_grows_with_the_target():
    table = {"sparsity": [0.0, 0.95], "nor": {"7": [0.9, 0.1], "10": [0.5, 0.05]}, "outliers": 0.1}
    flat = {"sparsity": [0.0, 0.95], "nor": {"7": [0.6, 0.3], "10": [0.6, 0.3]}, "outliers": 0.1}
    measures, sizes = [{"a": table}, {"b": flat}], {"a": 1, "b": 1}
    for target, multiple, other in ((0.7, 7, 10), (0.71, 10, 7)):
        found = MRP().assign(measures, sizes, target)
        assert found == MRP(outlier=multiple).assign(measures, sizes, target)
        assert found != MRP(outlier=other).assign(measures, sizes, target)
    with pytest.raises(ValueError, match="7, 10, not 3"):
        MRP(outlier=3).assign([{"a": table}], {"a": 1}, 0.7)


class Recorder:
    """A `remeasure` that notes what it was asked and answers with given measures."""

    def __init__(self, measures):
        self.measures, self.asked = measures, []

    def __call__(self, sparsities):
        self.asked.append(dict(sparsities))
        return self.measures


@pytest.mark.parametrize("refresh, calls", [("F0", 0), ("F1", 8), ("F2", 120)])
def test_scores_are_refreshed_as_the_model_grows_sparser(refresh, calls):
    _, sizes, measures = standard()
    method = MRP(refresh=refresh)
    probe = ModelOracle(remeasure=Recorder(json.loads(json.dumps(measures))))
    found = method.assign(measures, sizes, 0.7, probe=probe)
    assert found == method.assign(measures, sizes, 0.7)  # the same answers change nothing
    means = [mean_sparsity(asked, sizes) for asked in probe.remeasure.asked]
    assert len(means) == pytest.approx(calls, abs=1 if calls == 120 else 0)
    if refresh == "F1":
        assert means == pytest.approx([0.55 + 0.02 * i for i in range(8)], abs=0.01 / BLOCKS)
        assert of_blocks(probe.remeasure.asked[0]) == pytest.approx([0.55] * BLOCKS)


def test_what_the_sparse_model_says_counts():
    _, sizes, measures = standard()
    tables = [next(iter(m.values())) for m in measures]
    turned = [dict.fromkeys(m, t) for m, t in zip(measures, tables[::-1], strict=False)]
    found = MRP().assign(measures, sizes, 0.7, probe=ModelOracle(remeasure=Recorder(turned)))
    assert of_blocks(found) == pytest.approx(of_blocks(MRP().assign(measures, sizes, 0.7))[::-1], abs=1e-9)


def test_the_score_may_be_wandas():
    torch.manual_seed(0)
    stats = InputStats(frozenset({NORMS}))
    stats.add(torch.randn(30, 64) * torch.logspace(-1, 1, 64), sequences=3)
    weight = torch.randn(32, 64)
    layer = Layer("0.0", weight, stats=stats, scores=torch.rand(32, 64))
    wanda = Layer("0.0", weight, scores=weight.abs() * stats.norms)
    assert MRP(score="wanda").measure({"0.0": layer}, ByRow()) == MRP().measure({"0.0": wanda}, ByRow())
    assert MRP().measure({"0.0": layer}, ByRow()) != MRP().measure({"0.0": wanda}, ByRow())


def test_it_needs_no_more_than_its_options_use():
    assert MRP.needs == MRP().needs == {SCORES, REMEASURE}
    assert MRP(refresh="F0").needs == {SCORES}
    assert MRP(score="wanda").needs == {NORMS, REMEASURE}
    with pytest.raises(ValueError, match="scores"):
        MRP().measure({"a": Layer("a", torch.rand(4, 8))}, ByRow())


@pytest.mark.parametrize(
    "options",
    [{"reading": "D2"}, {"refresh": "F3"}, {"score": "magnitude"}, {"step": 0}, {"outlier": -1.0}, {"growth": 0}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="mrp: "):
        MRP(**options)


@pytest.mark.parametrize("options", [{"start": 0.8}, {"cap": 0.6}, {"start": -0.1}, {"cap": 1.0}])
def test_bounds_must_enclose_the_target(options):
    blocks = model()[:1]
    with pytest.raises(ValueError, match="start <= target <= cap"):
        MRP(**options).assign(measured(MRP(), blocks), sizes_of(blocks), 0.7)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)  # scipy's spearmanr
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
