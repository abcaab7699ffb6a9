"""LSA: errors and mapping from the authors' code; the greedy choice restated one weight at a time."""

import math

import pytest
import torch

from hf_sparsity.algorithm import GRAM, Layer
from hf_sparsity.allocators import lsa
from hf_sparsity.allocators.lsa import LSA, greedy_error
from hf_sparsity.core.stats import InputStats

# BlockWanda.blk_s of BeiYazi0/LSA, layersp/blk.py, on `example(k)`: shape, then errors by (columns, trial).
AUTHORS = [
    ((6, 16), {(8, 0.5): 1055.6845703125, (16, 0.5): 896.4049682617, (16, 0.75): 2911.375}),
    ((12, 32), {(8, 0.5): 4055.201416015625, (16, 0.5): 2941.062744140625, (16, 0.75): 12795.0517578125}),
    ((4, 48), {(8, 0.5): 1173.9058837890625, (16, 0.5): 877.6243286132812, (16, 0.75): 4308.42138671875}),
]


def example(k):
    """Layer k with correlated inputs of three sequences, made without a generator of random numbers."""
    rows, width = AUTHORS[k][0]
    n = torch.arange(rows * width, dtype=torch.float64).reshape(rows, width)
    weight = torch.sin(n * (1.3 + 0.1 * k) + n * n * 0.017) * (1 + 0.5 * torch.cos(n * 0.7))
    stats = InputStats(frozenset({GRAM}))
    n = torch.arange(20 * width, dtype=torch.float64).reshape(20, width)
    shared = 0.6 * torch.sin(torch.arange(20, dtype=torch.float64)[:, None] * 1.1)
    for s in range(3):
        x = (torch.sin(n * 0.9 + k + 7 * s + n * n * 0.013) + shared) * (1 + torch.arange(width) % 5)
        stats.add(x.float(), sequences=1)
    return Layer(str(k), weight.float(), stats=stats)


def step_by_step(weight, gram, columns, trial):
    """The definition: each time the weight whose removal makes the row's error `r H r` grow least, in float64."""
    weight, gram, total = weight.double(), gram.double(), 0.0
    for row in weight:
        gone = torch.zeros_like(row)
        for start in range(0, len(row), columns):
            group = list(range(start, min(start + columns, len(row))))
            for _ in range(int(trial * len(group))):
                errors = {}
                for j in group:
                    if gone[j] == 0:
                        more = gone.clone()
                        more[j] = row[j]
                        errors[j] = float(more @ gram @ more)
                best = min(errors, key=errors.get)
                gone[best] = row[best]
        total += float(gone @ gram @ gone)
    return total


@pytest.mark.parametrize("k", range(len(AUTHORS)))
def test_golden_errors(k):
    for (columns, trial), expected in AUTHORS[k][1].items():
        found = LSA(columns=columns, trial=trial).measure({"a": example(k)}, None)["a"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_golden_mapping():
    """blk_score, for errors 120, 45, 300 and 80 at 70 % with alpha 0.15."""
    found = LSA().assign([{f"{i}.q": e, f"{i}.up": e} for i, e in enumerate([120.0, 45.0, 300.0, 80.0])], {}, 0.7)
    expected = [0.6808823347, 0.5926470757, 0.8926470876, 0.6338235140]
    assert [found[f"{i}.up"] for i in range(4)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("columns", [4, 7, 100])
def test_the_error_is_that_of_the_greedy_choice(columns):
    torch.manual_seed(0)
    x = torch.randn(40, 18) @ (torch.eye(18) + 0.4 * torch.randn(18, 18))
    weight = torch.randn(5, 18)
    gram = x.T @ x
    for trial in (0.3, 0.5):
        expected = step_by_step(weight, gram, columns, trial)
        assert greedy_error(weight, gram, columns=columns, trial=trial) == pytest.approx(expected, rel=1e-5)


def test_tiles_of_rows_change_nothing(monkeypatch):
    layer = example(1)
    whole = greedy_error(layer.weight, layer.stats.gram, columns=16)
    monkeypatch.setattr(lsa, "TILE", 5 * 16)
    assert greedy_error(layer.weight, layer.stats.gram, columns=16) == pytest.approx(whole, rel=1e-6)


def test_dead_inputs_and_layers_cost_nothing():
    layer = example(0)
    gram = layer.stats.gram.clone()
    gram[:8], gram[:, :8] = 0, 0
    assert greedy_error(layer.weight, gram) == pytest.approx(0, abs=1e-6)  # the dead half goes first
    assert greedy_error(torch.zeros_like(layer.weight), layer.stats.gram) == 0
    assert math.isfinite(greedy_error(layer.weight.bfloat16(), layer.stats.gram))


def test_a_blocks_error_is_the_plain_mean_of_its_layers():
    measures = [{"0.a": 10.0, "0.b": 30.0}, {"1.a": 5.0, "1.b": 5.0}, {}, {"2.a": 40.0, "2.b": 0.0}]
    found = LSA(spread=0.1).assign(measures, dict.fromkeys("ab", 1), 0.5)
    assert found["0.a"] == found["0.b"] == found["2.a"] == found["2.b"] == pytest.approx(0.5 + 0.2 / 3)
    assert found["1.a"] == pytest.approx(0.5 - 0.4 / 3)
    each = LSA(spread=0.1, per="layer").assign(measures, {}, 0.5)
    assert each["2.a"] == max(each.values()) and each["2.b"] == min(each.values())
    assert each["2.a"] - each["2.b"] == pytest.approx(0.2)


def test_what_is_refused():
    for options in ({"spread": 0.5}, {"trial": 1.0}, {"trial": 0.0}, {"columns": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LSA(**options)
    with pytest.raises(ValueError, match="per='half' is unknown"):
        LSA(per="half")
    with pytest.raises(ValueError, match="down: lsa needs the Gram matrix"):
        LSA().measure({"down": Layer("down", torch.randn(4, 4))}, None)
