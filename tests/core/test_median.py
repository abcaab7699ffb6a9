"""The median by histograms against sorting."""

import pytest
import torch

from hf_sparsity.core import median as median_module
from hf_sparsity.core.median import median


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1001, 4096])
def test_the_median_is_torchs(count):
    torch.manual_seed(count)
    for values in (torch.rand(count), torch.randn(count).abs() * 1e-40, torch.randint(0, 3, (count,)).float()):
        parts = values.split(max(1, count // 3))
        assert median(lambda parts=parts: iter(parts)) == float(values.median())


def test_chunks_and_shapes_change_nothing(monkeypatch):
    values = torch.rand(30, 40)
    expected = float(values.median())
    assert median(lambda: [values]) == median(lambda: [values[:7], values[7:]]) == expected
    monkeypatch.setattr(median_module, "CHUNK", 37)
    assert median(lambda: [values.T]) == expected


def test_ends():
    assert median(lambda: [torch.zeros(4), -torch.zeros(4)]) == 0
    assert median(lambda: [torch.tensor([0.0, 3e38, float("inf")])]) == pytest.approx(3e38)
    with pytest.raises(ValueError, match="no numbers"):
        median(lambda: [])
    with pytest.raises(ValueError, match=">= 0"):
        median(lambda: [torch.tensor([-1.0])])
