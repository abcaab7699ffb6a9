"""Tail exponents: the authors' values, plain loops, and the ends they did not handle."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.core.power_law import _distances, _exponents, tail_exponent
from hf_sparsity.core.spectra import spectra
from tests.conftest import GOLDENS
from tests.core.goldens import ALPHA, FARMS, LLAMA


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
