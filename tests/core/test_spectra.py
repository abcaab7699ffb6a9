"""Eigenvalues, windows and tail fits: the authors' values, plain restatements, and the ends they did not handle."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.core import spectra as module
from hf_sparsity.core.power_law import _distances, _exponents, sparsities_by_exponent, tail_exponent
from hf_sparsity.core.spectra import sliding, spectra, whole

GOLDENS = Path(__file__).parents[1] / "fixtures/goldens"
LLAMA = GOLDENS / "llama-tiny"
ALPHA = json.loads((LLAMA / "alloc/alphapruning_70.json").read_text())
FARMS = json.loads((LLAMA / "alloc/farms.json").read_text())["runs"]["scripts_2000_Q1_ops15"]
SCRIPT = partial(sliding, height=2000, ratio=1.0, steps=15)


def weights(names):
    stored = load_file(GOLDENS / "models/llama-tiny/model.safetensors")
    return [stored[f"{name}.weight"] for name in names]


def naive_alpha(values, i):
    tail = [math.log(v) for v in values[i:]]
    return 1 + len(tail) / (sum(tail) - len(tail) * tail[0])


def naive_distance(values, i):
    alpha, n = naive_alpha(values, i), len(values) - i
    return max(abs(1 - (values[i + j] / values[i]) ** (1 - alpha) - j / n) for j in range(n))


def naive_fit(values, fit):
    """The fits of the papers, one eigenvalue at a time."""
    if fit == "mid":
        return naive_alpha(values, len(values) // 2)
    low, high = -math.inf, math.inf
    if fit != "ks":
        logs = [math.log10(v) for v in values]
        width = (max(logs) - min(logs)) / 100
        bars = [0] * 100
        for x in logs:
            bars[min(int((x - min(logs)) / width), 99)] += 1
        peak = 10 ** (min(logs) + width * bars.index(max(bars)))
        low = math.log10(0.95 * peak) if fit == "peak" else 0.95 * peak
        high = 1.5 * peak
    inside = [i for i in range(len(values) - 1) if low <= values[i] <= high]
    return naive_alpha(values, min(inside, key=lambda i: naive_distance(values, i)))


def spectrum(seed, n, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, 2 * n, generator=generator)
    stretched = normal * torch.linspace(0.3, 2, n)[:, None] ** (seed % 3) * scale
    return torch.linalg.svdvals(stretched).square().sort().values


@pytest.mark.parametrize("fit", ["mid", "peak", "ks"])
def test_fits_of_stored_eigenvalues_are_the_authors(fit):
    stored, run = load_file(LLAMA / "stats/esd_eigs_fp32.safetensors"), ALPHA[f"alpha_{fit}_fp32"]
    found = [tail_exponent(stored[name], fit) for name in run["names"]]
    assert found == pytest.approx(run["alpha"], rel=0, abs=5e-6 if fit == "ks" else 1e-6)


@pytest.mark.parametrize("fit", ["mid", "peak"])
def test_fits_of_pooled_eigenvalues_are_the_authors(fit):
    stored = load_file(LLAMA / "stats/farms_2000_Q1_ops15_eigs.safetensors")
    found = [tail_exponent(stored[name], fit) for name in FARMS["names"]]
    assert found == pytest.approx(FARMS[f"alpha_{fit}"], rel=0, abs=1e-6)


def test_fits_of_matrices_are_the_authors():
    matrices = load_file(GOLDENS / "edge/plfit_matrices.safetensors")
    for name, fits in json.loads((GOLDENS / "edge/plfit.json").read_text())["fits"].items():
        (pool,) = spectra([matrices[name]])
        for key, expected in fits.items():
            fit, _, filtered = key.partition("_")
            found = tail_exponent(pool, fit, floor=1e-5 if filtered else 0.0)
            assert found == pytest.approx(expected["alpha"], rel=2e-5), (name, key)


@pytest.mark.parametrize("fit", ["mid", "peak", "ks", "peak_fixed"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 7.0])
def test_fits_are_the_plain_loops(fit, scale):
    for seed in range(4):
        values = spectrum(seed, 61, scale)
        assert tail_exponent(values, fit) == pytest.approx(naive_fit(values.double().tolist(), fit), rel=1e-6)


def test_long_tails_are_sampled_without_changing_the_result():
    # Longer than the coarse samples, so that candidates are dropped before they are scored in full.
    values = torch.cat([spectrum(seed, 230) for seed in range(6)]).sort().values
    logs = values.double().log()
    alphas = _exponents(logs)
    every = torch.arange(len(values) - 1)
    full = _distances(logs, alphas, every, len(values))
    for i in (0, 17, 700, 1300, len(values) - 2):
        assert full[i].item() == pytest.approx(naive_distance(values.double().tolist(), i), rel=1e-6)
    assert tail_exponent(values, "ks") == float(alphas[full.argmin()])
    sampled = _distances(logs, alphas, every, 32)
    assert (sampled <= full + 1e-12).all() and (sampled < full - 1e-6).any()


def test_peak_depends_on_the_scale_and_peak_fixed_does_not():
    # A power law from 0.1 on and the highest bar of the histogram at 1. The published bound, log10(0.95 p)
    # with p the bar's position, is at most 0.16 p (at p = e), so only there does it exclude the law's start.
    law = 0.1 * ((torch.arange(200) + 0.5) / 200) ** -0.5
    values = torch.cat([law, torch.linspace(1.0, 1.02, 25)]).sort().values
    published = [tail_exponent(values * factor, "peak") for factor in (0.01, 3.0)]
    fixed = [tail_exponent(values * factor, "peak_fixed") for factor in (0.01, 1.0, 100.0)]
    assert abs(published[0] - published[1]) > 1e-3
    assert fixed == pytest.approx([fixed[0]] * 3, rel=1e-4)
    for factor, found in zip((0.01, 3.0), published, strict=True):
        assert found == pytest.approx(naive_fit((values * factor).double().tolist(), "peak"), rel=1e-6)


@pytest.mark.parametrize("fit", ["mid", "peak", "ks", "peak_fixed"])
def test_degenerate_spectra_give_a_finite_number_or_none(fit):
    for values in ([], [0.0] * 8, [3.0], [2.0] * 9, [0.0, 5.0], [0.0] * 7 + [1.0]):
        assert tail_exponent(torch.tensor(values), fit) is None
    for values in (
        [1.0, 2.0, 3.0],
        [0.0] * 5 + [1.0, 2.0, 3.0],
        [1e-30, 1.0, 2.0, 2.0, 9.0],
        [1e-12] * 90 + [1.0, 2.0, 4.0],
    ):
        alpha = tail_exponent(torch.tensor(values), fit)
        assert alpha is not None and math.isfinite(alpha) and alpha > 1


def test_zeros_below_the_middle_do_not_move_mid():
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 5.0, 9.0, 11.0])
    assert tail_exponent(values, "mid") == pytest.approx(naive_alpha(values.tolist(), 4))


def test_an_empty_window_falls_back_to_mid():
    # 20 decades in 100 bars: a bar is 1.58 wide, so all of the highest may lie above 1.5 times its left edge.
    values = torch.tensor([1e-20, 1e-9, 1.56e-2, 1.561e-2, 1.562e-2, 1.0])
    assert tail_exponent(values, "peak_fixed") == pytest.approx(naive_alpha(values.double().tolist(), 3), rel=1e-6)


def test_floor_that_removes_everything_removes_nothing():
    values = spectrum(0, 30) * 1e-9
    assert tail_exponent(values, "mid", floor=1e-5) == tail_exponent(values, "mid")


def test_unknown_fit():
    with pytest.raises(ValueError, match="use one of peak, mid, ks, peak_fixed"):
        tail_exponent(torch.ones(4), "median")


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
