"""A race as a whole: the plan it makes, who can win, and its budget."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hf_sparsity import Plan, SparsityConfig, make_plan, prune
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.race import evaluator
from hf_sparsity.race_record import RaceRecord
from tests.conftest import tiny
from tests.planning.race.searches import texts
from tests.tools import mostly_slow

CHEAP = ("owl", "dlp", "qkvo")


def raced(model, **options):
    config = SparsityConfig(0.6, allocator={"name": "race", "candidates": CHEAP, "slices": (48, 96), **options})
    return make_plan(model, config, texts())


@pytest.fixture(scope="module")
def plan():
    return raced(tiny("llama"))


def test_a_race_makes_an_ordinary_plan(plan, tmp_path):
    model = tiny("llama")
    assert plan.sparsity == pytest.approx(0.6, abs=1e-6)
    assert {r["kind"] for r in plan.chosen["candidates"]} == {"uniform", "single", "mixture", "descent"}
    assert plan.chosen["winner"] in {r["name"] for r in plan.chosen["candidates"]}
    assert plan.chosen["slices"] == [48, 96] and plan.chosen["data"]["certificate"] == 4
    best = plan.chosen["candidates"][0]
    uniform = next(r for r in plan.chosen["candidates"] if r["kind"] == "uniform")
    assert len(best["kl"]) == len(uniform["kl"]) == 2 and best["kl"][-1] <= uniform["kl"][-1]
    slopes = plan.chosen["spent"]["tokens"] - 48 * plan.chosen["spent"]["evals"]
    assert slopes >= 4 * 48 * plan.chosen["descent"]["steps"] and slopes % (4 * 48) == 0
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.config["allocator"]["candidates"] == list(CHEAP)
    report = prune(model, loaded, texts())
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    pruned = model.config.sparsity_config["pruned"]
    assert pruned["data"]["sequences"] == 12, "the certificate's text is no part of the pruner's statistics"
    assert pruned["certificate"]["kl"] == pytest.approx(plan.chosen["certificate"]["kl"]["chosen"], rel=0.2)
    assert pruned["certificate"]["data"] == plan.chosen["certificate"]["data"]


def test_the_same_race_twice_is_the_same_plan(plan):
    assert raced(tiny("llama")).to_dict() == plan.to_dict()


def test_uniform_can_win():
    model = tiny("llama")
    with torch.no_grad():  # nothing to choose: any mask of a zero matrix is as good
        for weight in find_layers(model).weights.values():
            weight.read().zero_()
    plan = raced(model)
    assert plan.chosen["winner"] == "uniform" and {layer.sparsity for layer in plan.layers.values()} == {0.6}


@pytest.mark.parametrize(
    ("pattern", "pruner", "architecture"),
    mostly_slow(
        [("*:8", "wanda", "llama"), ("unstructured", "sparsegpt", "llama"), ("unstructured", "magnitude", "mixtral")],
        [("*:8", "wanda", "llama")],
    ),
)
def test_a_race_of_other_patterns_pruners_and_experts(pattern, pruner, architecture):
    model = tiny(architecture)
    config = SparsityConfig(
        0.6, pattern, {"name": "race", "candidates": ("owl", "qkvo"), "slices": (48, 96)}, pruner=pruner
    )
    plan = make_plan(model, config, texts())
    plan.check_target()
    assert prune(model, plan, texts()).sparsity >= 0.6 - 0.01
    assert math.isfinite(plan.chosen["certificate"]["kl"]["chosen"])


def test_the_record_says_which_masks_stood_in_for_those_of_alps(plan):
    raced_with = {"name": "race", "candidates": ("owl",), "slices": (48,), "descent": 0}
    made = make_plan(tiny("llama"), SparsityConfig(0.6, allocator=raced_with, pruner="alps"), texts())
    assert "the search of alps starts from" in made.chosen["stand_in"] and "stand_in" not in plan.chosen
    assert RaceRecord.from_dict(made.chosen).to_dict() == made.chosen


def test_a_budget_ends_the_rounds():
    plan = raced(tiny("llama"), budget="1 evals")
    assert {len(r["kl"]) for r in plan.chosen["candidates"]} == {1}


def test_mistakes_are_told_before_work_starts():
    for allocator, message in (
        ({"name": "race", "candidates": ["owll"]}, "unknown candidate 'owll'; did you mean 'owl'"),
        ({"name": "race", "budget": "soon"}, "budget='soon'"),
        ({"name": "race", "metric": "accuracy"}, "use 'kl' or 'loss'"),
        ({"name": "race", "slices": [9, 3]}, "rising"),
        ({"name": "race", "confidence": 95}, "0.95"),
    ):
        with pytest.raises(ValueError, match=message):
            SparsityConfig(0.5, allocator=allocator)
    with pytest.raises(ValueError, match="nothing to decide"):
        SparsityConfig(pattern="2:4", allocator="race")
    model = tiny("llama")
    with pytest.raises(ValueError, match="needs calibration data"):
        make_plan(model, SparsityConfig(0.5, allocator="race"))
    with pytest.raises(ValueError, match="give at least 8"):
        make_plan(model, SparsityConfig(0.5, allocator="race"), texts(4))


@pytest.mark.parametrize("limit", [80, 200])
def test_a_time_is_kept(limit, monkeypatch):
    """The clock of this test is the model's head: it counts a second for each 24 tokens that it sees."""
    model, clock = tiny("llama"), [0.0]

    def tick(_, args):
        clock[0] += args[0].shape[0] * args[0].shape[1] / 24

    model.lm_head.register_forward_pre_hook(tick)
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    plan = raced(model, budget=f"{limit}s")
    assert clock[0] <= limit * 1.2  # what is foreseen is by tokens, and dense logits are computed for each anew
    plan.check_target()
    assert plan.chosen["certificate"] and len(plan.chosen["candidates"]) >= 2
