"""Eigenvalues and windows: the authors' values, plain restatements, and the ends they did not handle."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.core import spectra as module
from hf_sparsity.core.power_law import sparsities_by_exponent, tail_exponent
from hf_sparsity.core.spectra import sliding, spectra, whole
from tests.core.goldens import FARMS, LLAMA, SCRIPT, weights


@pytest.mark.parametrize("cut, file", [(whole, "esd_eigs_fp32"), (SCRIPT, "farms_2000_Q1_ops15_eigs")])
def test_eigenvalues_are_the_authors(cut, file):
    # Equal to the bit on the machine of the goldens; elsewhere LAPACK may round the smallest ones differently.
    stored = load_file(LLAMA / f"stats/{file}.safetensors")
    for pool, name in zip(spectra(weights(FARMS["names"]), cut), FARMS["names"], strict=True):
        assert torch.allclose(pool, stored[name], rtol=1e-3, atol=1e-5), name
        assert pool.dtype == torch.float32


@pytest.mark.parametrize("shape", [(96, 60), (60, 96), (200, 64), (64, 200)])
def test_small_windows_are_the_authors_primitive_to_the_bit(shape):
    # Not even transposed: that moves the last digits, and an alpha near the peak jumps with them.
    weight = torch.randn(shape)
    found = SCRIPT(*shape)
    parts = [weight[t : t + found.height, c : c + found.width] for t in found.tops for c in found.lefts]
    expected = torch.cat([torch.linalg.svdvals(part).square() for part in parts]).sort().values
    assert torch.equal(spectra([weight], SCRIPT)[0], expected)
    assert torch.equal(spectra([weight])[0], torch.linalg.svdvals(weight).square().sort().values)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (70, 70)])
@pytest.mark.parametrize("cut", [whole, partial(sliding, height=40, ratio=1.0, steps=5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_matrices_give_the_singular_values_of_every_window(monkeypatch, shape, cut, dtype):
    monkeypatch.setattr(module, "SMALL", 0)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    found = cut(*shape)
    expected = [
        torch.linalg.svdvals(weight.double()[top : top + found.height, left : left + found.width]).square()
        for top in found.tops
        for left in found.lefts
    ]
    (pool,) = spectra([weight], cut)
    assert torch.allclose(pool.double(), torch.cat(expected).sort().values, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 3.7])
def test_gram_and_svd_agree_for_any_aspect_ratio(monkeypatch, ratio):
    weight = torch.randn(64, 100)
    cut = partial(sliding, height=24, ratio=ratio, steps=4)
    (by_svd,) = spectra([weight], cut)
    monkeypatch.setattr(module, "SMALL", 0)
    (by_gram,) = spectra([weight], cut)
    assert torch.allclose(by_svd, by_gram, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(520, 640), (4500, 520)])
def test_a_large_matrix_takes_the_gram_side(shape):
    weight = torch.randn(shape) * 0.02
    (pool,) = spectra([weight])
    assert torch.allclose(pool.double(), torch.linalg.svdvals(weight.double()).square().sort().values, rtol=1e-6)


def test_rank_deficient_weights_have_no_negative_eigenvalues():
    weight = torch.randn(600, 4) @ torch.randn(4, 560)
    (pool,) = spectra([weight])
    assert (pool >= 0).all() and tail_exponent(pool, "peak") > 1
    assert spectra([torch.zeros(600, 560)])[0].eq(0).all()


def test_windows_of_the_papers_script():
    found = sliding(4096, 11008, height=2000, ratio=1.0, steps=15)
    assert (found.height, found.width, len(found.tops), len(found.lefts)) == (2000, 2000, 15, 15)
    assert found.tops[:2] == (0, 149) and found.lefts[-1] == 14 * 643


@pytest.mark.parametrize("rows, columns", [(128, 64), (64, 128), (5, 3), (1, 1), (128, 344)])
@pytest.mark.parametrize("ratio, steps", [(2.0, 10), (1.0, 1), (0.3, 4), (50.0, 2)])
def test_windows_stay_inside_the_matrix(rows, columns, ratio, steps):
    found = sliding(rows, columns, height=100, ratio=ratio, steps=steps)
    assert found.height >= 1 and found.width >= 1
    assert 1 <= len(found.tops) <= steps and 1 <= len(found.lefts) <= steps
    assert min(found.tops) == 0 and max(found.tops) + found.height <= rows
    assert min(found.lefts) == 0 and max(found.lefts) + found.width <= columns


def test_nan_is_the_users_to_repair():
    with pytest.raises(ValueError, match="NaN or infinity"):
        spectra([torch.tensor([[1.0, math.nan]])])


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = spectra([torch.randn(40, 30) for _ in range(5)])
        assert torch.get_num_threads() == 2 and [len(pool) for pool in many] == [30] * 5
    finally:
        torch.set_num_threads(before)


def test_allocation_ends():
    sizes = {"a": 10, "b": 20, "c": 30}
    assert sparsities_by_exponent([{"a": 2.0}, {"b": 2.0}], sizes, 0.6, spread=0.3) == {"a": 0.6, "b": 0.6}
    assert sparsities_by_exponent([{"a": None}, {"b": None}], sizes, 0.6, spread=0.3) == {"a": 0.6, "b": 0.6}
    assert sparsities_by_exponent([], sizes, 0.6, spread=0.3) == {}
    found = sparsities_by_exponent([{"a": 2.0, "b": None}, {"c": 4.0}], sizes, 0.5, spread=0.3, per="layer")
    assert found["a"] == found["b"] < found["c"]
    assert found["c"] / found["a"] == pytest.approx(1.3 / 0.7)
