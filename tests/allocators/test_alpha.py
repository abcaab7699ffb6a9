"""AlphaPruning against the authors' alphas and sparsities, from stored alphas and from weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.algorithm import Layer
from hf_sparsity.allocators.alpha import AlphaPruning
from hf_sparsity.core.budget import mean_sparsity, meet

GOLDENS = Path(__file__).parents[1] / "fixtures/goldens"
GOLDEN = json.loads((GOLDENS / "llama-tiny/alloc/alphapruning_70.json").read_text())
EDGE = json.loads((GOLDENS / "edge/allocation.json").read_text())
NAMES = GOLDEN["alpha_peak_fp32"]["names"]
WIDE = {"block": "block_wise", "layer": "layer_wise"}


def blocks(values):
    """A flat list over 4 blocks of 7 layers -> one mapping a block."""
    return [dict(zip(NAMES[i : i + 7], values[i : i + 7], strict=True)) for i in range(0, len(NAMES), 7)]


@pytest.fixture(scope="module")
def weights():
    stored = load_file(GOLDENS / "models/llama-tiny/model.safetensors")
    return {name: stored[f"{name}.weight"] for name in NAMES}


@pytest.mark.parametrize("per", ["block", "layer"])
@pytest.mark.parametrize("case", range(len(EDGE["cases"])))
def test_sparsities_of_given_alphas_are_the_authors(case, per):
    case = EDGE["cases"][case]
    sizes = dict(zip(NAMES, EDGE["prunable_numel"], strict=True))
    allocator = AlphaPruning(spread=case["epsilon"], per=per)
    found = allocator.assign(blocks(case["alpha"]), sizes, case["sparsity_ratio"])
    assert list(found.values()) == pytest.approx(case[f"alphapruning_{WIDE[per]}"], rel=0, abs=1e-9)
    assert mean_sparsity(found, sizes) == pytest.approx(case["sparsity_ratio"], abs=1e-6)
    met = meet(found, sizes, case["sparsity_ratio"])
    assert max(met.values()) < 1 and mean_sparsity(met, sizes) == pytest.approx(case["sparsity_ratio"], abs=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("fit", ["peak", "mid", "ks"])
def test_from_weights_to_sparsities(weights, fit, dtype):
    golden = GOLDEN[f"alpha_{fit}_{dtype}"]
    cast = {name: w.half() if dtype == "fp16" else w for name, w in weights.items()}
    for per in ("block", "layer"):
        allocator = AlphaPruning(fit=fit, per=per)
        layers = blocks([Layer(name, cast[name]) for name in NAMES])
        measures = [allocator.measure(block) for block in layers]
        assert [a for m in measures for a in m.values()] == pytest.approx(golden["alpha"], rel=1e-5)
        found = allocator.assign(measures, {n: w.numel() for n, w in weights.items()}, GOLDEN["sparsity_ratio"])
        assert list(found.values()) == pytest.approx(golden[f"ratios_{WIDE[per]}"], abs=1e-5)
        for name, expected in zip(NAMES, golden[f"ratios_{WIDE[per]}"], strict=True):
            width = weights[name].shape[1]
            assert int(width * found[name]) == int(width * expected)


def test_a_layer_that_cannot_be_fitted_takes_the_mean_of_its_block():
    allocator = AlphaPruning(fit="mid", per="layer")
    block = {"a": Layer("a", torch.zeros(16, 16)), "b": Layer("b", torch.randn(16, 24))}
    other = {"c": Layer("c", torch.randn(16, 16))}
    measures = [allocator.measure(block), allocator.measure(other)]
    assert measures[0]["a"] is None and allocator.number(None) is None
    found = allocator.assign(measures, {"a": 256, "b": 384, "c": 256}, 0.5)
    assert found["a"] == found["b"] != found["c"]


def test_identical_layers_are_pruned_alike():
    allocator, weight = AlphaPruning(), torch.randn(32, 32)
    measures = [allocator.measure({str(i): Layer(str(i), weight)}) for i in range(3)]
    assert allocator.assign(measures, dict.fromkeys("012", 1024), 0.7) == dict.fromkeys("012", 0.7)


def test_larger_alpha_is_pruned_more():
    found = AlphaPruning().assign([{"a": 2.0}, {"b": 4.0}], {"a": 100, "b": 100}, 0.5)
    assert found["b"] / found["a"] == pytest.approx(1.3 / 0.7) and found["a"] < 0.5 < found["b"]


@pytest.mark.parametrize(
    "wrong", [{"fit": "median"}, {"per": "row"}, {"spread": 1.0}, {"spread": -0.1}, {"spread": "0.3"}, {"floor": -1}]
)
def test_wrong_hyperparameters_say_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.*(use one of|at least 0)"):
        AlphaPruning(**wrong)
