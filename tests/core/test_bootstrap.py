"""The paired bootstrap: coverage, weights, and the same draws for all columns."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity.core.bootstrap import paired_bootstrap, resampled_means
from hf_sparsity.records import Interval


def test_the_bootstrap_covers_the_truth_and_weighs_by_tokens():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(200):
        measured = paired_bootstrap(torch.randn(60, generator=generator), seed=seed)
        inside += measured.low <= 0 <= measured.high
    assert 175 <= inside <= 200
    assert paired_bootstrap([[3.0, 1.0], [5.0, 4.0]], weights=[3.0, 1.0]) == Interval(1.75, 1.0, 2.0)
    assert paired_bootstrap([1.0, 2.0, 4.0], seed=1) == paired_bootstrap([1.0, 2.0, 4.0], seed=1)
    assert paired_bootstrap([2.0]) == Interval(2.0, 2.0, 2.0)
    pairs = torch.randn(9, 2)
    drawn = resampled_means(pairs, torch.ones(9), seed=3)
    assert torch.equal(drawn[:, 0], resampled_means(pairs[:, 0], torch.ones(9), seed=3))
    for bad in ([], [[1.0, 2.0, 3.0]]):
        with pytest.raises(ValueError, match=r"differences|weights"):
            paired_bootstrap(bad)
