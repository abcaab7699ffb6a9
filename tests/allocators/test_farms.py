"""FARMS against the authors' pooled alphas and sparsities."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.algorithm import Layer
from hf_sparsity.allocators.farms import FARMS
from hf_sparsity.core.spectra import sliding

GOLDENS = Path(__file__).parents[1] / "fixtures/goldens"
RUNS = json.loads((GOLDENS / "llama-tiny/alloc/farms.json").read_text())["runs"]
EDGE = json.loads((GOLDENS / "edge/allocation.json").read_text())
NAMES = RUNS["scripts_2000_Q1_ops15"]["names"]
QUIRK = "argparse_100_Q2_ops10_negative_slice_quirk"
SAME = [name for name in RUNS if name not in (QUIRK, "stepwise_48_Q1_step10")]


def allocator(run, **changes):
    fields = {"rows": run["num_row_samples"], "ratio": run["Q_ratio"], "ops": run["sampling_ops_per_dim"]}
    return FARMS(**fields, spread=run["epsilon"], **changes)


def clamped(sparsity, target):
    """The authors' clamp, which misses the target; ours is `core/budget.py`."""
    return sparsity if sparsity <= 1 else 0.99999 if target == 0.7 else 0.998


def blocks(values):
    return [dict(zip(NAMES[i : i + 7], values[i : i + 7], strict=True)) for i in range(0, len(NAMES), 7)]


@pytest.fixture(scope="module")
def weights():
    stored = load_file(GOLDENS / "models/llama-tiny/model.safetensors")
    return {name: stored[f"{name}.weight"] for name in NAMES}


@pytest.mark.parametrize("name", SAME)
def test_from_weights_to_sparsities(weights, name):
    run, target = RUNS[name], RUNS[name]["sparsity_ratio"]
    layers = blocks([Layer(n, w) for n, w in weights.items()])
    mid = [a for block in layers for a in allocator(run, fit="mid").measure(block).values()]
    assert mid == pytest.approx(run["alpha_mid"], rel=1e-5)
    measures = [allocator(run).measure(block) for block in layers]
    peak = [a for m in measures for a in m.values()]
    # Entries that jump with the last digit of an SVD are compared only where the SVD is the same.
    for found, expected, stable in zip(peak, run["alpha_peak"], run["stable_fp64_svd"], strict=True):
        assert not stable or found == pytest.approx(expected, rel=1e-4)
    sizes = {n: w.numel() for n, w in weights.items()}
    given = allocator(run).assign(blocks(run["alpha_peak"]), sizes, target)
    assert [clamped(s, target) for s in given.values()] == pytest.approx(run["ratios"], rel=0, abs=1e-9)


@pytest.mark.parametrize("case", range(len(EDGE["cases"])))
def test_sparsities_of_given_alphas_are_the_authors(case):
    case = EDGE["cases"][case]
    sizes = dict(zip(NAMES, EDGE["prunable_numel"], strict=True))
    found = FARMS(spread=case["epsilon"]).assign(blocks(case["alpha"]), sizes, case["sparsity_ratio"])
    expected = case["farms_block_wise_clamped"]
    assert [clamped(s, case["sparsity_ratio"]) for s in found.values()] == pytest.approx(expected, rel=0, abs=1e-9)


def test_windows_that_wrapped_around_in_the_authors_code_now_fit(weights):
    run = RUNS[QUIRK]
    layers = blocks([Layer(n, w) for n, w in weights.items()])
    found = {n: a for block in layers for n, a in allocator(run).measure(block).items()}
    fitting = 0
    for name, expected in zip(NAMES, run["alpha_peak"], strict=True):
        rows, columns = weights[name].shape
        cut = sliding(rows, columns, height=100, ratio=2.0, steps=10)
        assert cut.width == 2 * cut.height <= columns
        if 2 * min(100, rows, columns) <= columns:  # no wrap: the published windows
            fitting += 1
            assert found[name] == pytest.approx(expected, rel=1e-4)
    assert 0 < fitting < len(NAMES)


def test_a_square_layer_within_one_window_is_alphaprunings():
    from hf_sparsity.allocators.alpha import AlphaPruning

    block = {"a": Layer("a", torch.randn(48, 48))}
    assert FARMS().measure(block) == AlphaPruning().measure(block)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (40, 3)])
def test_tiny_layers_are_measured_or_left_to_their_block(shape):
    (alpha,) = FARMS(rows=4, ops=3).measure({"a": Layer("a", torch.randn(shape))}).values()
    assert alpha is None or alpha > 1


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"ops": 0}, {"ops": 1.5}, {"ratio": 0}, {"ratio": float("inf")}, {"spread": 2}]
)
def test_wrong_hyperparameters_say_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*must be"):
        FARMS(**wrong)
