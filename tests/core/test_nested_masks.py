"""Ranks against the pruner's own masks, points against counting."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity.algorithm import Layer, Pattern
from hf_sparsity.core import masks, nested_masks
from hf_sparsity.core.budget_grid import Grid
from hf_sparsity.core.nested_masks import mask_levels, rank_blocks, rank_rows, row_levels
from hf_sparsity.pruners import Wanda


@pytest.mark.parametrize("width", [7, 64, 300])
def test_ranks_hold_the_pruners_masks_at_every_step(width):
    scores = torch.randn(5, width).abs()
    ranks = rank_rows(scores)
    assert len(ranks.zeros) == min(width, 256)
    for step, zeros in enumerate(ranks.zeros):
        layer = Layer("x", scores, sparsity=(zeros / 5 + 0.5) / width)
        assert torch.equal(ranks.mask(step), Wanda().mask(layer, scores)), step
        assert int((~ranks.mask(step)).sum()) == zeros


def test_ranks_in_groups_are_the_patterns():
    scores = torch.randn(6, 32)
    ranks = rank_rows(scores, 8)
    for step in range(8):
        layer = Layer("x", scores, sparsity=step / 8, pattern=Pattern.parse("*:8").at(step / 8))
        assert torch.equal(ranks.mask(step), Wanda().mask(layer, scores) if step else torch.ones(6, 32).bool())
        assert ranks.zeros[step] == step * 24


def test_a_point_takes_what_uniform_really_takes_and_no_layer_can_keep_more():
    torch.manual_seed(0)
    shapes = {"a": (8, 33), "b": (40, 64), "c": (16, 300), "d": (4, 9)}
    ranks = {name: rank_rows(torch.rand(shape)) for name, shape in shapes.items()}
    sizes = {name: out * width for name, (out, width) in shapes.items()}
    grid = Grid({n: r.zeros for n, r in ranks.items()}, sizes, {n: r.cells for n, r in ranks.items()}, 0.7)
    assert grid.mass == 8 * 23 + 40 * 44 + 16 * 210 + 4 * 6
    for seed in range(20):
        wanted = {
            name: float(torch.rand(1, generator=torch.Generator().manual_seed(9 * seed + i)))
            for i, name in enumerate(sizes)
        }
        point = grid.nearest(wanted)
        taken = sum(int((~ranks[n].mask(k)).sum()) for n, k in zip(grid.names, point, strict=True))
        steps = [ranks[n].zeros[k] - ranks[n].zeros[k - 1] for n, k in zip(grid.names, point, strict=True) if k]
        assert 0 <= taken - grid.mass < min(steps)
        sparsities = grid.sparsities(point)
        assert sum(sparsities[n] * sizes[n] for n in sizes) == pytest.approx(0.7 * sum(sizes.values()), abs=1e-6)
        for name, k in zip(grid.names, point, strict=True):  # the pruner does what the point says
            layer = Layer(name, torch.zeros(shapes[name]), sparsity=sparsities[name])
            assert layer.counts * shapes[name][0] == ranks[name].zeros[k]


def test_the_nearest_point_of_a_point_is_itself():
    ranks = rank_rows(torch.rand(8, 64))
    grid = Grid(dict.fromkeys("abc", ranks.zeros), dict.fromkeys("abc", 512), dict.fromkeys("abc", 8), 0.5)
    assert grid.nearest(grid.fractions((10, 32, 54))) == (10, 32, 54)


def test_blocks_of_columns_are_ranked_apart():
    scores = torch.cat([torch.rand(4, 16), 100 + torch.rand(4, 16), 200 + torch.rand(4, 8)], dim=1)
    ranks = rank_blocks(scores, 16)
    mask = ranks.mask(128)
    assert [(~part).float().mean().item() for part in mask.split(16, dim=1)] == [0.5, 0.5, 0.5]
    assert ranks.zeros[128] == 80


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("chunk", [50, 1 << 24])
def test_row_levels_count_the_masks_that_keep_a_weight(ties, chunk, monkeypatch):
    monkeypatch.setattr(nested_masks, "CHUNK", chunk)
    torch.manual_seed(1)
    scores = torch.randint(0, 5, (9, 20)).float() if ties else torch.rand(9, 20)
    counts = [0, 0, 3, 4, 4, 11, 19, 20]
    expected = sum(masks.keep_rows(scores, c).to(torch.uint8) for c in counts)
    assert torch.equal(row_levels(scores, counts), expected)


def test_mask_levels_count_the_masks_that_keep_a_weight():
    torch.manual_seed(2)
    scores = torch.rand(9, 20)
    counts = [3, 4, 11, 19, 20]
    assert torch.equal(mask_levels((masks.keep_rows(scores, c) for c in counts), scores), row_levels(scores, counts))


def test_a_row_of_one_weight_has_one_step():
    ranks = rank_rows(torch.rand(5, 1))
    assert ranks.zeros == (0,) and not ranks.survives.any() and ranks.mask(0).all()
