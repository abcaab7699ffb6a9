"""Intervals and comparisons: their words, their JSON, and what is not theirs."""

from __future__ import annotations

import math

import pytest

from hf_sparsity.records import Comparison, Interval, PlanPair, SourcePlans, SourceScore

KL = {"uniform": 0.7, "chosen": 0.6, "uniform_minus_chosen": {"value": 0.1, "low": 0.05, "high": 0.15}}
RECORDED = {
    "kl": KL,
    "perplexity": {"uniform": 9.5, "chosen": 9.25, "uniform_minus_chosen": {"value": 0.25, "low": -1.0, "high": 1.5}},
    "sequences": 4,
    "predictions": 508,
    "confidence": 0.95,
    "resamples": 1000,
    "seed": 0,
    "of": "masks",
    "data": {"sequences": 4, "tokens": 512, "sha256": "ab"},
}


def test_json_comes_back_key_by_key_in_the_same_order():
    compared = Comparison.from_dict(RECORDED)
    assert compared.to_dict() == RECORDED and list(compared.to_dict()) == list(RECORDED)
    least = {"kl": KL, "perplexity": KL, "predictions": 508}
    assert Comparison.from_dict(least | {"of another release": 1}).to_dict() == least


def test_scores_by_source_come_back_too():
    score = {"weight": 0.5, "sequences": 2, "predictions": 62, "kl": 0.1, "perplexity": {"dense": 9.0, "pruned": 9.5}}
    assert SourceScore.from_dict(score).to_dict() == score
    assert list(SourceScore.from_dict(score).to_dict()) == list(score)
    plans = {"sequences": 2, "uniform": 0.5, "chosen": 0.4}
    assert SourcePlans.from_dict(plans).to_dict() == plans
    for damage in ({"sequences": 1.5}, {"kl": math.inf}, {"perplexity": {"dense": 9.0}}):
        with pytest.raises(ValueError, match=r"of a measurement|of a source are damaged"):
            SourceScore.from_dict(score | damage)


def test_it_says_itself_in_words():
    assert Comparison.from_dict(RECORDED).lines() == [
        "kl: uniform 0.7000, chosen 0.6000, difference 0.1000 [0.0500, 0.1500]",
        "perplexity: uniform 9.5000, chosen 9.2500, difference 0.2500 [-1.0000, 1.5000]",
    ]
    assert str(Interval(2.0)) == "2.0000"


@pytest.mark.parametrize(
    ("low", "high", "pays"), [(0.1, 0.2, True), (-0.2, -0.1, False), (-0.1, 0.1, None), (0.0, 0.1, None)]
)
def test_it_pays_only_where_zero_is_outside(low, high, pays):
    gain = Interval((low + high) / 2, low, high)
    assert gain.is_above_zero is pays
    assert Comparison(PlanPair(0.5, 0.5, gain), PlanPair(2.0, 2.0, Interval(0.0)), 9).pays is pays


@pytest.mark.parametrize(
    "damage",
    [
        {"kl": None},
        {"kl": {"uniform": 1.0}},
        {"kl": KL | {"uniform": "much"}},
        {"kl": KL | {"uniform_minus_chosen": {"value": math.nan, "low": 0.0, "high": 1.0}}},
        {"perplexity": KL | {"uniform_minus_chosen": [0.1, 0.0, 0.2]}},
        {"predictions": "many"},
    ],
    ids=str,
)
def test_a_damaged_one_is_an_error(damage):
    with pytest.raises(ValueError, match=r"comparison|interval|measurement"):
        Comparison.from_dict(RECORDED | damage)
    with pytest.raises(ValueError, match="comparison"):
        Comparison.from_dict([RECORDED])
