"""MSP, reconstructed: the budget, the search, and what its plans become."""

import itertools
import json
import math
from random import Random

import pytest
import torch

from hf_sparsity.algorithm import Layer, ModelOracle, Pattern, Pruner
from hf_sparsity.allocators.msp import MSP, Genes, evolve
from hf_sparsity.core import masks
from hf_sparsity.core.budget import mean_sparsity, meet_groups


class ByRow(Pruner):
    name = "by-row"

    def scores(self, layer):
        return layer.weight.abs().float()


def space(sizes, fisher=None, *, levels=8, target=0.75, seed=0):
    return Genes(sizes=sizes, fisher=fisher or [1.0] * len(sizes), levels=levels, target=target, random=Random(seed))


def model(blocks=12, *, unequal=False, seed=0):
    """Measures and sizes of blocks with two layers; Fisher traces spread over decades."""
    draw = Random(seed)
    measures = [{f"{i}.{k}": 10 ** draw.uniform(-3, 1) for k in ("q", "up")} for i in range(blocks)]
    sizes = {n: draw.choice((64, 512, 1000)) if unequal else 64 * (1 + n.count("u")) for m in measures for n in m}
    return measures, sizes


class Loss:
    """Separable: each block's own importance times a convex function of its sparsity. Counts its calls."""

    def __init__(self, measures, power=2.0, seed=1):
        draw, self.calls, self.seen = Random(seed), 0, []
        self.importance = {n: 10 ** draw.uniform(-1, 0.5) for m in measures for n in m}
        self.power = power

    def __call__(self, sparsities):
        self.calls += 1
        value = math.fsum(w * sparsities[n] ** self.power for n, w in self.importance.items())
        self.seen.append((tuple(sparsities.items()), value))
        return value


def kept_of(sparsities, levels=8):
    kept = {n: (1 - s) * levels for n, s in sparsities.items()}
    assert all(k == round(k) and 1 <= k <= levels for k in kept.values())
    return {n: round(k) for n, k in kept.items()}


@pytest.mark.parametrize("per", ["block", "layer"])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.7, 0.75, 0.875])
def test_the_budget_holds_for_every_candidate(target, unequal, per):
    measures, sizes = model(unequal=unequal)
    loss = Loss(measures)
    found = MSP(per=per, generations=4, population=8).assign(
        measures, sizes, target, group=8, probe=ModelOracle(loss=loss)
    )
    genes = [[n] for n in sizes] if per == "layer" else [list(m) for m in measures]
    assert list(found) == list(sizes)
    for sparsities in [found, *(dict(seen) for seen, _ in loss.seen)]:
        kept = kept_of(sparsities)
        room = (1 - target) * 8 * sum(sizes.values()) - sum(kept[n] * sizes[n] for n in sizes)
        assert room >= -1e-5
        raisable = [sum(sizes[n] for n in names) for names in genes if kept[names[0]] < 8]
        assert not raisable or room < min(raisable)
        assert all(len({kept[n] for n in names}) == 1 for names in genes)


def test_equal_blocks_meet_the_target_exactly():
    measures, _ = model()
    sizes = {n: 64 for m in measures for n in m}
    found = MSP().assign(measures, sizes, 0.75, group=8, probe=ModelOracle(loss=Loss(measures)))
    assert mean_sparsity(found, sizes) == 0.75
    assert len(set(found.values())) > 1
    assert meet_groups(found, sizes, 0.75, 8) == found  # nothing left for the caller to repair


@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
def test_unstructured_moves_in_sixteenths(target):
    measures, sizes = model()
    found = MSP(generations=3).assign(measures, sizes, target, probe=ModelOracle(loss=Loss(measures)))
    kept_of(found, 16)
    smallest = min(sum(sizes[n] for n in m) for m in measures)
    assert target <= mean_sparsity(found, sizes) + 1e-9 < target + smallest / 16 / sum(sizes.values()) + 1e-8


def test_targets_at_the_ends():
    measures, sizes = model()
    probe = ModelOracle(loss=Loss(measures))
    assert set(MSP().assign(measures, sizes, 0.0, probe=probe).values()) == {0.0}
    assert set(MSP().assign(measures, sizes, 0.95, probe=probe).values()) == {0.95}  # below one in 16
    assert set(MSP().assign(measures, sizes, 0.95, group=8, probe=probe).values()) == {0.875}
    assert probe.loss.calls == 0
    one, probe = measures[:1], ModelOracle(loss=Loss(measures[:1]))
    single = MSP().assign(one, dict.fromkeys(one[0], 8), 0.75, group=8, probe=probe)
    assert set(single.values()) == {0.75}


def test_without_a_loss_it_refuses():
    measures, sizes = model()
    for probe in (None, ModelOracle(), ModelOracle(remeasure=list)):
        with pytest.raises(ValueError, match="loss"):
            MSP().assign(measures, sizes, 0.75, group=8, probe=probe)


@pytest.mark.parametrize("seed", range(5))
def test_repair_is_idempotent_and_terminates(seed):
    draw = Random(seed)
    sizes = [draw.choice((10, 30, 77)) for _ in range(20)]
    genes = space(sizes, [10 ** draw.uniform(-20, 20) for _ in sizes], target=draw.choice((0.1, 0.5, 0.8)), seed=seed)
    for start in ([1] * 20, [8] * 20, [-5] * 20, [99] * 20, [draw.randint(-3, 12) for _ in sizes]):
        repaired = genes.repair(start)
        assert genes.repair(repaired) == repaired
        assert sum(n * s for n, s in zip(repaired, sizes, strict=False)) <= genes.budget


def test_repair_spares_the_sensitive():
    genes = space([1] * 40, [100.0] * 20 + [0.01] * 20, target=0.5)
    lowered = genes.repair([6] * 40)
    assert lowered[:20] == (6,) * 20 and sum(lowered[20:]) == 40
    raised = genes.repair([3] * 40)
    assert sum(raised[:20]) == 100 and raised[20:] == (3,) * 20


@pytest.mark.parametrize("target, expected", [(0.75, [2] * 10), (0.7, [2, 2, 3, 2, 3] * 2), (0.875, [1] * 10)])
def test_uniform_deals_out_evenly_what_lies_between_two_levels(target, expected):
    assert list(space([64] * 10, target=target).uniform()) == expected


def test_the_first_population():
    fisher = [math.exp(i) for i in range(9)]  # z: (i - 4) / sqrt(20 / 3)
    genes = space([5] * 9, fisher, levels=16, target=0.5)
    population = genes.first(20, (0.4, 0.8, 1.2), 0.35)
    assert len(population) == len(set(population)) == 20
    assert genes.uniform() == (8,) * 9 == population[0]
    for kappa in (0.4, 0.8, 1.2):
        assert tuple(round(8 + kappa * (i - 4) / math.sqrt(20 / 3)) for i in range(9)) in population
    assert all(sum(n) == 72 for n in population)


@pytest.mark.parametrize("fisher", [[0.0] * 6, [1.0] * 6, [0.0, 1e-300, 1.0, 1e30, 5.0, 5.0]])
def test_silent_layers_do_not_break_the_seeding(fisher):
    genes = space([4] * 6, fisher, target=0.5)
    assert all(math.isfinite(z) for z in genes.z)
    assert all(sum(n) == 24 for n in genes.first(10, (0.4, 0.8, 1.2), 0.35))


def test_a_child_is_the_head_of_one_parent_and_the_tail_of_another():
    genes, a, b = space([1] * 8, target=0.75), (1, 3) * 4, (3, 1) * 4
    children = {genes.child([a, b], 0.0) for _ in range(200)}
    assert {a[:cut] + b[cut:] for cut in (2, 4, 6)} | {b[:cut] + a[cut:] for cut in (2, 4, 6)} < children
    assert all(sum(child) == 16 for child in children)
    assert space([1]).child([(2,), (2,)], 0.0) == (2,)


@pytest.mark.parametrize("mutation, moved", [(0.0, 0), (0.1, 0.1), (1.0, 1)])
def test_mutation_moves_genes_by_one_step(mutation, moved):
    genes, parent = space([1] * 400, levels=16, target=0.5), (8,) * 400
    genes.repair = tuple  # the step before the repair
    steps = [n - 8 for n in genes.child([parent], mutation)]
    assert set(steps) <= {-1, 0, 1}
    assert sum(map(abs, steps)) / 400 == pytest.approx(moved, abs=0.05)
    assert abs(sum(steps)) <= 80


@pytest.mark.parametrize("options", [{}, {"mutation": 1.0, "population": 6, "parents": 2}])
def test_the_best_fitness_never_rises_and_nothing_is_asked_twice(options):
    measures, _ = model()
    loss = Loss(measures)

    def of_genotype(genotype):
        return loss({name: 1 - kept / 8 for kept, block in zip(genotype, measures, strict=False) for name in block})

    _, history = evolve(MSP(**options), space([3] * 12), lambda genotypes: [of_genotype(g) for g in genotypes])
    assert len(history) > 5
    assert all(after <= before for before, after in itertools.pairwise(history))
    assert history[-1] < history[0]
    assert len({key for key, _ in loss.seen}) == loss.calls <= 20 + 30 * 16
    assert min(value for _, value in loss.seen) == history[-1]


def test_it_stops_when_nothing_is_gained():
    calls = []
    _, history = evolve(MSP(), space([3] * 12), lambda genotypes: calls.extend(genotypes) or [1.0] * len(genotypes))
    assert len(history) == 1 + MSP().patience


def test_the_number_of_evaluations_can_be_bounded():
    measures, sizes = model()
    for most in (1, 7, 50):
        loss = Loss(measures)
        found = MSP(evaluations=most).assign(measures, sizes, 0.75, group=8, probe=ModelOracle(loss=loss))
        assert loss.calls == most
        assert dict(min(loss.seen, key=lambda seen: seen[1])[0]) == found
        assert set(loss.seen[0][0]) == {(n, 0.75) for n in sizes}  # uniform comes first


def test_same_seed_same_run():
    measures, sizes = model()
    runs = []
    for seed in (3, 3, 4):
        loss = Loss(measures)
        again = json.loads(json.dumps(measures))
        MSP().assign(again, sizes, 0.75, group=8, probe=ModelOracle(loss=loss, seed=seed))
        runs.append(loss.seen)
    assert runs[0] == runs[1] != runs[2]


def test_a_loss_that_is_not_a_number_loses():
    measures, sizes = model()
    loss = Loss(measures)
    bad = lambda s: math.nan if s["0.q"] > 0.7 else loss(s)  # noqa: E731
    assert MSP().assign(measures, sizes, 0.75, group=8, probe=ModelOracle(loss=bad))["0.q"] <= 0.7


@pytest.mark.parametrize("seed", range(3))
def test_within_two_percent_of_a_separable_optimum(seed):
    """Equal blocks and convex costs: raising the gene that gains most, one step at a time, is optimal."""
    measures, _ = model(seed=seed)
    sizes = {n: 64 for m in measures for n in m}
    loss = Loss(measures, seed=seed + 10)
    # The Fisher trace is a noisy hint of the importance, as it is in a model.
    measures = [{n: loss.importance[n] * 2 ** Random(n).uniform(-1, 1) for n in m} for m in measures]
    cost = [sum(loss.importance[n] for n in m) for m in measures]
    kept = [1] * len(cost)
    for _ in range(len(cost)):  # from 1 of 8 to 2 of 8 on average
        gain = [
            c * ((1 - n / 8) ** 2 - (1 - (n + 1) / 8) ** 2) if n < 8 else -1 for c, n in zip(cost, kept, strict=False)
        ]
        kept[gain.index(max(gain))] += 1
    best = math.fsum(c * (1 - n / 8) ** 2 for c, n in zip(cost, kept, strict=False))
    found = MSP().assign(measures, sizes, 0.75, group=8, probe=ModelOracle(loss=loss, seed=seed))
    uniform = loss(dict.fromkeys(sizes, 0.75))
    assert loss(found) <= 1.02 * best
    assert uniform > 1.05 * best


def test_plans_become_masks():
    """Every group has exactly n weights left; the uniform genotype is the pruner's own 2:8; masks are nested."""
    torch.manual_seed(0)
    measures, _ = model(blocks=6)
    layers = {n: Layer(n, torch.randn(16, 32)) for m in measures for n in m}
    sizes = {n: layer.weight.numel() for n, layer in layers.items()}
    found = MSP().assign(measures, sizes, 0.75, group=8, probe=ModelOracle(loss=Loss(measures)))
    kept = kept_of(found)
    assert len(set(kept.values())) > 1
    for name, layer in layers.items():
        layer.sparsity, layer.pattern = found[name], Pattern(kept[name], 8)
        new = ByRow().prune(layer)
        assert ((new != 0).reshape(16, 4, 8).sum(2) == kept[name]).all()
        layer.pattern = Pattern.parse("2:8")
        own = ByRow().prune(layer) != 0
        assert torch.equal(own, masks.keep_groups(layer.weight.abs(), round(0.25 * 8), 8))
        less, more = sorted((own, new != 0), key=lambda mask: int(mask.sum()))
        assert not (less & ~more).any()


def test_measure_passes_the_fisher_trace_on():
    block = {"q": Layer("q", torch.zeros(2, 2), fisher=0.25), "k": Layer("k", torch.zeros(2, 2), fisher=0.0)}
    assert MSP().measure(block, ByRow()) == {"q": 0.25, "k": 0.0}
    for bad in (None, math.nan, math.inf):
        with pytest.raises(ValueError, match="v_proj: msp needs the Fisher"):
            MSP().measure({"v_proj": Layer("v_proj", torch.zeros(2, 2), fisher=bad)}, ByRow())


@pytest.mark.parametrize(
    "options",
    [
        {"per": "row"},
        {"parents": 0},
        {"parents": 9, "population": 8},
        {"steps": 1},
        {"mutation": 1.5},
        {"evaluations": 0},
    ],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="msp: "):
        MSP(**options)


def test_options_round_trip_through_json():
    options = json.loads(json.dumps(MSP(kappas=(0.1, 0.2)).to_dict()))
    assert options.pop("name") == "msp"
    assert MSP(**options) == MSP(kappas=(0.1, 0.2))
