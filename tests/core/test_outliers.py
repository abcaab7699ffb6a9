"""Outlier ratios: the authors' numbers to the bit, and tables equal to pruning and counting."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.core import masks, outliers
from hf_sparsity.core.nested_masks import row_levels
from hf_sparsity.core.outliers import Survivors, outlier_percent

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"


def llama_block():
    """Wanda scores of the tiny model's first block, in module order, from the authors' statistics."""
    weights = load_file(GOLDENS / "models" / "llama-tiny" / "model.safetensors")
    mean_sq = load_file(GOLDENS / "llama-tiny" / "stats" / "wanda_70_scaler_row.safetensors")
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    for name in (f"model.layers.0.{name}" for name in names):
        yield weights[f"{name}.weight"].abs() * mean_sq[name].sqrt()


def test_golden_outlier_percent():
    golden = json.loads((GOLDENS / "llama-tiny" / "alloc" / "owl_70.json").read_text())
    assert outlier_percent(llama_block(), 181_248, 5.0) == golden["outlier_percent"][0]
    assert outlier_percent(llama_block(), 181_248, 6.0) == golden["structure_5of8_M6_L2"]["outlier_percent"][0]


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_a_score_at_the_threshold_is_no_outlier(chunk, monkeypatch):
    monkeypatch.setattr(outliers, "CHUNK", chunk)
    parts = [torch.ones(2, 2), torch.full((2, 2), 5.0), torch.zeros(4, 4)]  # of mean 1
    assert outlier_percent(iter(parts), 24, 5.0) == 0
    assert outlier_percent(iter(parts), 24, 4.9999995) == 4 / 24 * 100  # the float32 below 5


def test_the_mean_is_that_of_the_concatenation():
    torch.manual_seed(0)
    parts = [torch.rand(50, 64) ** 8 for _ in range(5)]
    flat = torch.cat([p.flatten() for p in parts])
    for multiple in (1.0, 2.0, 5.0):
        expected = float((flat > flat.mean() * multiple).sum()) / len(flat) * 100
        assert outlier_percent(parts, flat.numel(), multiple) == expected


@pytest.mark.parametrize("promised", [0, 11, 13])
def test_a_wrong_count_is_refused(promised):
    with pytest.raises((ValueError, RuntimeError)):
        outlier_percent([torch.rand(3, 4)], promised, 5.0)


def brute_force_nor(scores, keeps, multiple, dense):
    """Prune, flatten, concatenate, average, count."""
    whole = torch.cat([s.flatten().double() for s in scores])
    keep = torch.cat([k.flatten() for k in keeps])
    mean = whole.mean() if dense else (whole * keep).mean()
    found = int((whole[keep] > multiple * mean).sum())
    return 1 - found / (int(keep.sum()) if dense else len(whole))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("multiple", [1.5, 3.0, 7.0])
@pytest.mark.parametrize("chunk", [333, 1 << 24])
def test_non_outlier_ratios_equal_pruning_and_counting(multiple, dense, chunk, monkeypatch):
    monkeypatch.setattr(outliers, "CHUNK", chunk)
    torch.manual_seed(2)
    scores = [torch.randn(30, 50).exp(), torch.randn(20, 70).abs(), torch.randn(10, 50).exp() ** 2]
    grid = [i / 20 for i in range(20)]
    counts = [[int(s.shape[1] * g) for g in grid] for s in scores]
    left = Survivors(scores, [row_levels(s, c) for s, c in zip(scores, counts, strict=False)], len(grid))
    found = left.non_outlier_ratios(multiple, dense=dense)
    for step in range(len(grid)):
        keeps = [masks.keep_rows(s, c[step]) for s, c in zip(scores, counts, strict=False)]
        assert found[step] == pytest.approx(brute_force_nor(scores, keeps, multiple, dense), abs=1e-12)
        assert left.kept[step] == sum(int(k.sum()) for k in keeps)
    assert len(set(found)) > 5


def test_a_survivor_at_the_threshold_is_no_outlier():
    scores = torch.tensor([[5.0, 1, 1, 1, 1, 1, 0, 0, 0, 0]])  # thresholds: 5, then 4.5, then 2.5
    left = Survivors([scores], [row_levels(scores, [0, 5, 9])], 3)
    assert left.non_outlier_ratios(5.0) == [1.0, 0.9, 0.9]
    assert left.sums.tolist() == [10, 9, 5]


@pytest.mark.parametrize("bad", [-1.0, torch.nan])
def test_scores_below_zero_are_refused(bad):
    scores = torch.rand(4, 4)
    scores[2, 1] = bad
    with pytest.raises(ValueError, match=">= 0"):
        Survivors([scores], [torch.ones(4, 4, dtype=torch.uint8)], 1)
