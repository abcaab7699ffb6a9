"""The paired bootstrap over documents: its intervals cover what they say, and pairing makes them narrower."""

from __future__ import annotations

import math

import numpy as np
import torch

from hf_sparsity.core import bootstrap
from hf_sparsity.evaluation.metrics import Interval
from hf_sparsity.evaluation.resampling import Resampling


def perplexity(sums):
    return np.exp(sums[..., 1] / sums[..., 0])


def resample(sums, resamples, seed):
    return bootstrap.resampled_sums(torch.from_numpy(sums), resamples=resamples, seed=seed).numpy()


def documents(rng, count=60):
    """(predictions, loss) of documents of unequal length, some harder than others; the true perplexity is e²."""
    predictions = rng.integers(50, 150, count)
    return np.stack([predictions, predictions * rng.normal(2, 0.4, count)], axis=1).astype(float)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for repetition in range(300):
        sums = documents(rng)
        found = Resampling(sums, 300, seed=repetition).interval(perplexity)
        hits += found.low <= math.exp(2) <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_pairing_makes_the_comparison_sharper():
    """The same documents are hard for both models, which a paired ratio does not see."""
    rng = np.random.default_rng(0)
    sums = documents(rng)
    sums = np.column_stack([sums, sums[:, 1] + sums[:, 0] * rng.normal(0.3, 0.05, len(sums))])
    paired = Resampling(sums, 1000, 0).interval(lambda s: np.exp((s[..., 2] - s[..., 1]) / s[..., 0]))
    one, other = perplexity(resample(sums[:, :2], 1000, 1)), perplexity(resample(sums[:, [0, 2]], 1000, 2))
    low, high = np.quantile(other / one, [0.025, 0.975])
    assert paired.low < math.exp(0.3) < paired.high
    assert paired.high - paired.low < (high - low) / 3


def test_a_resample_is_as_many_units_drawn_together(monkeypatch):
    sums = np.array([[1.0, 1, 10], [1, 2, 20], [1, 4, 40]])
    drawn = resample(sums, 500, seed=3)
    assert drawn.shape == (500, 3)
    assert (drawn[:, 0] == 3).all() and np.array_equal(drawn[:, 2], 10 * drawn[:, 1])
    assert set(drawn[:, 1]) == {3, 4, 5, 6, 7, 8, 9, 10, 12}  # all sums of three of 1, 2, 4, with replacement
    assert np.array_equal(drawn, resample(sums, 500, seed=3)) and not np.array_equal(drawn, resample(sums, 500, seed=4))
    monkeypatch.setattr(bootstrap, "DRAWN", 10)  # in many steps, the last of them smaller
    pieces = resample(sums, 500, seed=3)
    assert pieces.shape == (500, 3) and (pieces[:, 0] == 3).all() and set(pieces[:, 1]) == set(drawn[:, 1])


def test_one_unit_has_no_interval():
    assert Resampling(np.array([[2.0, 2.0]])).interval(perplexity) == Interval(math.e, None, None)
