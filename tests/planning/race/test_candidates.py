"""Who enters a race: every allocator, each measured once, and mixtures that keep the budget."""

from __future__ import annotations

import json

import pytest
import torch

from hf_sparsity.algorithm import Layer, Pattern
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.planning.race.candidates import Candidate, allocators, measurement_key, mixtures
from hf_sparsity.pruners import Wanda


def test_every_allocator_enters_and_uniform_first():
    found = allocators(())
    assert {a.name for a in found.values()} == set(ALLOCATORS) - {"msp"} and next(iter(found)) == "uniform"
    assert {a.name for a in allocators(("owl",)).values()} == {"uniform", "owl"}


@pytest.mark.parametrize("name", [name for name, allocator in ALLOCATORS.items() if allocator.only_in_assign])
def test_those_who_share_a_measure_would_have_measured_the_same(name):
    torch.manual_seed(0)
    from hf_sparsity.core.stats import InputStats

    def layer(shape):
        stats = InputStats(frozenset({"norms", "gram", "samples"}))
        stats.add(torch.randn(40, shape[1]), sequences=2, last=None)
        stats.close(2)
        return Layer("x", torch.randn(shape), stats, fisher=2.0)

    block = {"a": layer((24, 24)), "b": layer((48, 24))}
    for one in allocators((name,)).values():
        mine, shared = (json.dumps(a.measure(block, Wanda())) for a in (one, measurement_key(one)))
        assert mine == shared


def test_mixtures_meet_the_budget():
    sizes = {"a": 100, "b": 300, "c": 50}
    plans = [
        Candidate(n, "single", s, {})
        for n, s in (("x", {"a": 0.9, "b": 0.5, "c": 0.9}), ("y", {"a": 0.4, "b": 0.7, "c": 0.7}))
    ]
    (made,) = mixtures(plans, sizes, 0.6, Pattern())
    assert sum(made.sparsities[n] * sizes[n] for n in sizes) == pytest.approx(0.6 * 450)
    assert made.sparsities["a"] - made.sparsities["b"] == pytest.approx(0.05)
