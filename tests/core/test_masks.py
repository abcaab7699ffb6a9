"""Masks: exact counts, and ties as a stable ascending sort breaks them."""

import itertools
import math

import pytest
import torch

from hf_sparsity.core import masks
from hf_sparsity.core.masks import keep_groups, keep_layer, keep_rows, ranks_in_groups


def scores_of(kind, seed, rows=7, columns=24):
    torch.manual_seed(seed)
    if kind == "ties":
        return torch.randint(0, 4, (rows, columns)).float()
    if kind == "half":
        return (torch.randn(rows, columns) / 4).abs().to(torch.bfloat16)
    if kind == "equal":
        return torch.full((rows, columns), 0.5)
    return torch.rand(rows, columns)


def stable_rows(scores, counts):
    """Row by row in plain Python: sort the columns by score, equal scores by column, prune the first."""
    mask = []
    for row, count in zip(scores.tolist(), counts, strict=False):
        order = sorted(range(len(row)), key=lambda j: row[j])
        mask.append([j not in order[:count] for j in range(len(row))])
    return torch.tensor(mask)


KINDS = ("distinct", "ties", "half", "equal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 11, 12, 23, 24])
@pytest.mark.parametrize("seed", range(3))
def test_rows_equal_a_stable_sort(kind, count, seed):
    scores = scores_of(kind, seed)
    assert torch.equal(keep_rows(scores, count), stable_rows(scores, [count] * 7))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_their_own_counts(kind):
    scores, counts = scores_of(kind, 3), [0, 1, 5, 12, 20, 23, 24]
    assert torch.equal(keep_rows(scores, torch.tensor(counts)), stable_rows(scores, counts))


@pytest.mark.parametrize("counts", [5, torch.full((7,), 5)])
def test_rows_stay_exact_with_nan(counts):
    scores = scores_of("distinct", 0)
    scores[2, 3:9] = torch.nan
    scores[4] = torch.nan
    keep = keep_rows(scores, counts)
    assert (keep.sum(1) == 19).all()
    assert keep[2, 3:9].all()  # NaN sorts last, as in torch.sort


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_layer_threshold_is_inclusive(kind, sparsity):
    scores = scores_of(kind, 1)
    ordered = sorted(scores.flatten().tolist())
    index = int(len(ordered) * sparsity)
    if index == 0:
        expected = torch.ones_like(scores, dtype=torch.bool)
    else:
        expected = scores > ordered[min(index, len(ordered) - 1)]
    assert torch.equal(keep_layer(scores, sparsity), expected)


def test_layer_prunes_one_more_than_asked():
    assert int((~keep_layer(torch.arange(100.0).reshape(10, 10), 0.3)).sum()) == 31


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept, group", [(1, 4), (2, 4), (2, 8), (5, 8), (8, 8), (7, 12)])
def test_groups_equal_a_stable_sort(kind, kept, group):
    scores = scores_of(kind, 2)
    expected = stable_rows(scores.reshape(-1, group), [group - kept] * (scores.numel() // group))
    assert torch.equal(keep_groups(scores, kept, group), expected.reshape(scores.shape))


def test_groups_stay_exact_with_nan():
    scores = scores_of("distinct", 0)
    scores[1, 2:10] = torch.nan
    assert (keep_groups(scores, 2, 8).reshape(7, 3, 8).sum(2) == 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_nested_in_the_number_kept(kind):
    scores = scores_of(kind, 4)
    masks = [keep_groups(scores, n, 8) for n in range(1, 9)]
    assert all(bool((more | ~less).all()) for less, more in itertools.pairwise(masks))
    ranks = ranks_in_groups(scores, 8).reshape(scores.shape)
    assert ranks.dtype == torch.uint8
    assert all(torch.equal(ranks >= 8 - n, mask) for n, mask in enumerate(masks, start=1))


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"2:8.*12"):
        keep_groups(torch.rand(3, 12), 2, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeroing_is_masked_fill(dtype, monkeypatch):
    monkeypatch.setattr(masks, "TILE", 50)
    for shape in ((), (0,), (7,), (13, 11), (3, 5, 8)):
        values, dead = torch.randn(shape, dtype=dtype), torch.rand(shape) < 0.5
        if values.numel() > 5:
            values.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        expected = values.masked_fill(dead, 0)
        found = masks.zero_(values, dead)
        assert found is values and torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    wide, dead = torch.randn(6, 8, dtype=dtype), torch.rand(8, 6) < 0.5
    expected = wide.T.masked_fill(dead, 0)
    assert torch.equal(masks.zero_(wide.T, dead), expected) and torch.equal(wide.T, expected)  # not contiguous
    row = torch.tensor([True, False] * 4)
    assert torch.equal(masks.zero_(wide, row), wide.masked_fill(row, 0))  # broadcast
    leaf = torch.randn(4, dtype=dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        masks.zero_(leaf, row[:4])
    with torch.no_grad():
        assert masks.zero_(leaf, row[:4])[0] == 0


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("group", [4, 8, 32])
def test_groups_are_ordered_as_by_a_stable_sort(kept, group):
    for scores in (torch.rand(8, 64), torch.randint(0, 3, (8, 64)).float(), torch.zeros(2, 64)):
        grouped = scores.reshape(len(scores), -1, group)
        ranks = grouped.argsort(dim=2, stable=True).argsort(dim=2)
        assert torch.equal(masks.ranks_in_groups(scores, group).long(), ranks)
        expected = (ranks >= group - kept).reshape(scores.shape)
        assert torch.equal(masks.keep_groups(scores, kept, group), expected)
    scores[0, 5] = torch.nan  # counts as the largest
    assert masks.keep_groups(scores, kept, group)[0, 5]
