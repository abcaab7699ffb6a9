"""What every algorithm of the tables promises, checked without knowing any of them: a new line in a table is tested here."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import sys

import pytest
import torch

from hf_sparsity import algorithm
from hf_sparsity.algorithm import FISHER, GRAM, LOSS, NORMS, REMEASURE, SAMPLES, SCORES, Layer, ModelOracle, Pattern
from hf_sparsity.allocators import ALLOCATORS, ROW_ALLOCATORS
from hf_sparsity.config import SparsityConfig, resolve
from hf_sparsity.core import budget
from hf_sparsity.core.stats import InputStats
from hf_sparsity.pruners import PRUNERS
from tests.tools import row_and_column

TABLES = {"allocator": ALLOCATORS, "row_allocator": ROW_ALLOCATORS, "pruner": PRUNERS}
CONTRACTS = {"allocator": algorithm.Allocator, "row_allocator": algorithm.RowAllocator, "pruner": algorithm.Pruner}
EVERY = [(role, name) for role, table in TABLES.items() for name in table]
TARGETS = [0.7, 0.0, 0.5, 0.95]
SHAPES = {"q": (32, 48), "k": (8, 48), "up": (40, 48), "down": (48, 40)}  # [out, in]; widths are multiples of 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(width: int, seed: int, dead: tuple[int, ...] = ()) -> InputStats:
    """Everything that can be collected of 8 sequences of 12 tokens; `dead` columns are always 0."""
    generator = torch.Generator().manual_seed(seed)
    stats = InputStats(frozenset({NORMS, GRAM, SAMPLES}))
    scale = torch.rand(width, generator=generator) * 3 + 0.1
    mix = torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator)
    for _ in range(8):
        x = torch.randn(12, width, generator=generator) @ mix * scale
        x[:, list(dead)] = 0
        stats.add(x, sequences=1)
    return stats


def make_layer(name: str, shape: tuple[int, int], seed: int = 0, *, dtype=torch.float32, dead=(), scale=1.0) -> Layer:
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp() * 0.05 * scale
    return Layer(name, weight.to(dtype), stats=inputs(shape[1], seed, dead))


def make_blocks(kind: str = "usual", group: int | None = None) -> list[dict[str, Layer]]:
    """Blocks whose layers differ in size, and which are not alike; or what may go wrong."""
    blocks = []
    for b in range(1 if kind == "one block" else 5):
        seed = 0 if kind == "all alike" else 10 * b
        block = {f"{b}.{n}": make_layer(f"{b}.{n}", s, seed + i) for i, (n, s) in enumerate(SHAPES.items())}
        for i, layer in enumerate(block.values()):
            if kind == "a dead block" and b == 2:
                layer.weight = torch.zeros_like(layer.weight)
            if kind == "outliers":
                layer.weight[: b + 1, : 2 + b] *= 40
            layer.fisher = 0.0 if kind == "a dead block" and b == 2 else float((1 + seed % 7) * (i + 1)) ** 2
            layer.pattern = Pattern(None, group)
            layer.scores = PRUNERS["wanda"]().scores(layer)
        blocks.append(block)
    if kind == "an empty block":
        blocks.insert(1, {})
    return blocks


KINDS = ["usual", "outliers", "all alike", "one block", "a dead block", "an empty block"]


@functools.cache
def measured(name: str, kind: str, group: int | None):
    """([block], {layer: size}, [measures])"""
    blocks = make_blocks(kind, group)
    sizes = {n: layer.weight.numel() for block in blocks for n, layer in block.items()}
    return blocks, sizes, [ALLOCATORS[name]().measure(block, PRUNERS["wanda"]()) for block in blocks]


def allocated(name: str, target: float, kind: str = "usual", group: int | None = None, asked=None):
    """({layer: sparsity}, {layer: size}), by the steps of `make_plan`; `asked` collects what the loss was asked."""
    allocator, pruner = ALLOCATORS[name](), PRUNERS["wanda"]()
    blocks, sizes, measures = measured(name, kind, group)

    def loss(sparsities):
        if asked is not None:
            asked.append(sparsities)
        return sum(s**2 + math.sin(997 * s * (i + 1)) for i, s in enumerate(sparsities.values()))

    probe = ModelOracle(0, loss, lambda sparsities: [allocator.measure(block, pruner) for block in blocks])
    assigned = allocator.assign(measures, sizes, target, group=group, probe=probe)
    assert list(assigned) == list(sizes), "same layers in and out, in the same order"
    if group is None:
        return budget.meet(assigned, sizes, target), sizes
    ideal = assigned if allocator.returns_group_multiples else budget.meet(assigned, sizes, target, high=1 - 1 / group)
    return budget.meet_groups(ideal, sizes, target, group), sizes


# ---- every algorithm


@pytest.mark.parametrize(("role", "name"), EVERY, ids=[n for _, n in EVERY])
def test_says_what_it_is(role, name):
    cls = TABLES[role][name]
    assert issubclass(cls, CONTRACTS[role])
    assert cls.name == name
    assert cls.paper.startswith("https://") or (name == "uniform" and cls.paper == "")
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "a docstring of its own, not dataclass's"
    module = sys.modules[cls.__module__].__doc__
    assert module and cls.paper in module, "the file's docstring cites the paper"
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls().needs <= {NORMS, GRAM, SAMPLES, SCORES, FISHER, LOSS, REMEASURE}
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls)), (
        "every hyperparameter has a default"
    )


@pytest.mark.parametrize(("role", "name"), EVERY, ids=[n for _, n in EVERY])
def test_round_trips_through_json(role, name):
    instance = TABLES[role][name]()
    data = json.loads(json.dumps(instance.to_dict()))
    assert data["name"] == name
    assert set(data) - {"name"} == {field.name for field in dataclasses.fields(instance)}
    again = resolve(role, data, TABLES[role], CONTRACTS[role])
    assert again == instance and again.needs == instance.needs
    assert hash(again) == hash(instance)


# ---- allocators


@pytest.mark.parametrize(("kind", "target"), row_and_column(KINDS, TARGETS))
@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators_meet_the_target(name, kind, target):
    sparsities, sizes = allocated(name, target, kind)
    assert set(sparsities) == set(sizes)
    assert all(type(s) is float and 0 <= s < 1 for s in sparsities.values())
    total = sum(sizes.values())
    assert math.fsum(sparsities[n] * sizes[n] for n in sizes) / total == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "kind"), row_and_column([0.7, 0.0, 0.5, 0.875], ["usual", "outliers", "a dead block"])
)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators_choose_how_many_of_eight(name, kind, target):
    sparsities, sizes = allocated(name, target, kind, group=8)
    assert all(8 * s == int(8 * s) and 0 <= s <= 7 / 8 for s in sparsities.values())
    total = sum(sizes.values())
    reached = math.fsum(sparsities[n] * sizes[n] for n in sizes) / total
    assert target - 1e-6 <= reached < target + max(sizes.values()) / total / 8 + 1e-6


@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators_are_deterministic(name):
    for group in (None, 8):
        asked: list[list] = [[], []]
        first = allocated(name, 0.6, group=group, asked=asked[0])[0]
        torch.manual_seed(99)
        random.seed(99)
        measured.cache_clear()
        assert allocated(name, 0.6, group=group, asked=asked[1])[0] == first
        assert asked[0] == asked[1], "a search took another way"


@pytest.mark.parametrize("name", ALLOCATORS)
def test_measures_have_a_number_each(name):
    for kind in KINDS:
        for block, measures in zip(*measured(name, kind, None)[::2], strict=True):
            assert list(measures) == list(block)
            for value in measures.values():
                number = ALLOCATORS[name]().number(value)
                assert number is None or (type(number) is float and math.isfinite(number))


@pytest.mark.parametrize("name", ALLOCATORS)
def test_measuring_changes_nothing(name):
    block = make_blocks()[1]
    before = {n: (layer.weight.clone(), layer.scores.clone(), layer.stats.gram.clone()) for n, layer in block.items()}
    first = ALLOCATORS[name]().measure(block, PRUNERS["wanda"]())
    for n, layer in block.items():
        for old, new in zip(before[n], (layer.weight, layer.scores, layer.stats.gram), strict=True):
            assert torch.equal(old, new)
    assert json.dumps(ALLOCATORS[name]().measure(block, PRUNERS["wanda"]())) == json.dumps(first)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_measuring_takes_half_precision(name):
    block = make_blocks()[1]
    for layer in block.values():
        layer.weight = layer.weight.to(torch.bfloat16)
    numbers = [ALLOCATORS[name]().number(m) for m in ALLOCATORS[name]().measure(block, PRUNERS["wanda"]()).values()]
    assert all(n is None or math.isfinite(n) for n in numbers)


# ---- row allocators


def scored(layer: Layer, sparsity: float) -> Layer:
    return dataclasses.replace(layer, sparsity=sparsity, scores=PRUNERS["wanda"]().scores(layer))


@pytest.mark.parametrize(("target", "dead"), row_and_column(TARGETS, [(0, 5, 6), (), tuple(range(48))]))
@pytest.mark.parametrize("name", ROW_ALLOCATORS)
def test_rows_meet_the_layers_sparsity(name, target, dead):
    layer = scored(make_layer("up", (40, 48), dead=dead), target)
    before = layer.weight.clone(), layer.scores.clone()
    rows = ROW_ALLOCATORS[name]().rows(layer)
    assert rows.shape == (40,) and rows.dtype == torch.float32 and bool(rows.isfinite().all())
    assert float(rows.double().mean()) == pytest.approx(target, abs=1e-6)
    assert torch.equal(rows, ROW_ALLOCATORS[name]().rows(layer))
    assert torch.equal(before[0], layer.weight) and torch.equal(before[1], layer.scores)
    if target == 0:
        assert not rows.any()
    layer.rows = rows
    assert bool(((layer.counts >= 0) & (layer.counts <= 48)).all())


# ---- pruners


def documented_zeros(name: str, layer: Layer, dead: tuple[int, ...] = ()) -> int:
    """Exact numbers of zeros where no scores tie: by default `int(in * sparsity)` in every row."""
    out, width = layer.weight.shape
    if layer.sparsity == 0:
        return 0
    if name == "magnitude":  # the authors' threshold is inclusive: one more goes, of the whole matrix
        return int(out * width * layer.sparsity) + 1
    if name == "sparsegpt":  # likewise, in each block of columns; and all of what has no input
        step = PRUNERS[name]().block_size
        blocks = [range(e, min(e + step, width)) for e in range(0, width, step)]
        return sum(max(int(out * len(b) * layer.sparsity) + 1, out * len(set(b) & set(dead))) for b in blocks)
    if name == "alps":  # of the whole matrix, the authors' rounding; and all of what has no input
        return max(out * width - round((1 - layer.sparsity) * out * width), out * len(dead))
    if name == "admm":  # of the whole matrix
        return int(out * width * layer.sparsity)
    return out * int(width * layer.sparsity)


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


DEAD = [(), (0, 7, 8, 30)]


@pytest.mark.parametrize(("dead", "sparsity", "dtype"), row_and_column(DEAD, [0.5, 0.01, 0.7, 0.95], DTYPES))
@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_make_the_documented_number_of_zeros(name, dtype, sparsity, dead):
    layer = make_layer("up", (40, 160), dtype=dtype, dead=dead)  # wider than one block of SparseGPT
    layer.sparsity = sparsity
    before = layer.weight.clone()
    pruned = PRUNERS[name]().prune(layer)
    assert pruned.shape == before.shape and pruned.dtype == dtype
    assert bool(pruned.isfinite().all())
    assert torch.equal(layer.weight, before), "the layer's weight is not to be modified"
    expected = documented_zeros(name, layer, dead)
    if name == "magnitude" and dtype != torch.float32:  # half precision has ties, and those go together
        assert expected <= zeros(pruned) < expected + 0.01 * pruned.numel()
        assert before[pruned == 0].abs().max() < before[pruned != 0].abs().min()
    else:
        assert zeros(pruned) == expected


@pytest.mark.parametrize(("dead", "pattern", "dtype"), row_and_column(DEAD, ["2:4", "1:4", "4:8", "7:8"], DTYPES))
@pytest.mark.parametrize("name", PRUNERS)
def test_every_group_keeps_n_of_m(name, dtype, pattern, dead):
    layer = make_layer("up", (40, 160), dtype=dtype, dead=dead)
    layer.pattern = Pattern.parse(pattern)
    layer.sparsity = layer.pattern.sparsity
    pruned = PRUNERS[name]().prune(layer)
    assert pruned.shape == layer.weight.shape and pruned.dtype == dtype and bool(pruned.isfinite().all())
    kept = (pruned.unflatten(1, (-1, layer.pattern.group)) != 0).sum(-1)
    assert bool((kept <= layer.pattern.kept).all())
    if not dead:  # what has no input may be zeroed beyond the pattern
        assert bool((kept == layer.pattern.kept).all())


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pattern_that_does_not_divide_the_width_is_refused(name):
    layer = make_layer("up", (8, 42))
    for pattern in ("2:4", "*:2"):
        layer.pattern, layer.sparsity = Pattern.parse(pattern), 0.5
        with pytest.raises(ValueError, match="pattern"):
            PRUNERS[name]().prune(layer)


@pytest.mark.parametrize(
    ("dead", "pattern", "dtype"), row_and_column([*DEAD, tuple(range(160))], ["unstructured", "2:4", "rows"], DTYPES)
)
@pytest.mark.parametrize("name", PRUNERS)
def test_pruning_a_pruned_layer_changes_nothing(name, dtype, pattern, dead):
    layer = make_layer("up", (40, 160), dtype=dtype, dead=dead)
    layer.sparsity = 0.5
    if pattern == "rows":
        layer.rows = torch.linspace(0.3, 0.7, 40)
    else:
        layer.pattern = Pattern.parse(pattern)
    once = PRUNERS[name]().prune(layer)
    assert bool(once.isfinite().all()) and zeros(once) >= 0.45 * once.numel()
    twice = PRUNERS[name]().prune(dataclasses.replace(layer, weight=once.clone()))
    assert torch.equal(once, twice)


@pytest.mark.parametrize(("dead", "dtype"), row_and_column(DEAD, DTYPES))
@pytest.mark.parametrize("name", PRUNERS)
def test_sparsity_0_changes_nothing(name, dtype, dead):
    layer = make_layer("up", (40, 160), dtype=dtype, dead=dead)
    assert torch.equal(PRUNERS[name]().prune(layer), layer.weight)
    layer.rows = torch.zeros(40)
    assert torch.equal(PRUNERS[name]().prune(layer), layer.weight)


@pytest.mark.parametrize("name", PRUNERS)
def test_rows_lose_their_own_number(name):
    layer = make_layer("up", (40, 160))
    layer.rows = torch.linspace(0.0, 0.97, 40)
    layer.sparsity = float(layer.rows.mean())
    SparsityConfig(0.5, row_allocator="trim", pruner=name)  # the pruner says it can
    pruned = PRUNERS[name]().prune(layer)
    assert (pruned == 0).sum(1).tolist() == layer.counts.tolist()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", PRUNERS)
def test_pruning_together_equals_pruning_apart(name, pattern):
    shared = inputs(160, seed=4)
    layers = [make_layer(n, (rows, 160), seed=i) for i, (n, rows) in enumerate([("q", 32), ("k", 8), ("v", 24)])]
    layers.append(make_layer("other", (16, 96), seed=9))  # not fed by the same tensor
    for layer, sparsity in zip(layers, (0.5, 0.8, 0.0, 0.6), strict=True):
        layer.pattern = Pattern.parse(pattern)
        layer.sparsity = sparsity if pattern == "unstructured" else 0.5
        if layer.name != "other":
            layer.stats = shared
    apart = [PRUNERS[name]().prune(layer) for layer in layers]
    together = PRUNERS[name]().prune_together(layers)
    assert len(together) == len(layers)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    order = [2, 0, 3, 1]
    shuffled = PRUNERS[name]().prune_together([layers[i] for i in order])
    for i, b in zip(order, shuffled, strict=True):
        torch.testing.assert_close(apart[i], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRUNERS)
def test_scores_and_masks(name):
    """Higher = keep, one score a weight; a mask of the scores has as many zeros as pruning makes."""
    layer = make_layer("up", (40, 160))
    layer.sparsity = 0.5
    pruner = PRUNERS[name]()
    scores = pruner.scores(layer)
    assert scores.shape == layer.weight.shape and bool(scores.isfinite().all()) and bool((scores >= 0).all())
    mask = pruner.mask(layer, scores)
    assert mask.shape == layer.weight.shape and mask.dtype == torch.bool
    assert int((~mask).sum()) == documented_zeros(name, layer)
    if pruner.needs <= {NORMS}:  # fixed scores decide: what goes is the mask, and what stays is as it was
        assert torch.equal(pruner.prune(layer), layer.weight * mask)
        assert torch.equal(pruner.prune(dataclasses.replace(layer, scores=-scores)) != 0, pruner.mask(layer, -scores))


@pytest.mark.parametrize("name", PRUNERS)
def test_flat_statistics_leave_magnitude_to_decide(name):
    """What an expert without tokens gets: all inputs alike, so the smallest weights go."""
    layer = make_layer("up", (40, 96))
    layer.stats = InputStats.flat(PRUNERS[name].needs, 96, 2.5, torch.device("cpu"))
    layer.rows = torch.full((40,), 0.5)
    layer.sparsity = 0.5
    pruned = PRUNERS[name]().prune(layer)
    for before, after in zip(layer.weight.abs(), pruned, strict=True):
        assert before[after == 0].max() < before[after != 0].min()
