"""TRIM: the authors' rows from the authors' inputs, a plain restatement, and the ends they did not handle."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hf_sparsity.algorithm import NORMS, SAMPLES, Layer
from hf_sparsity.allocators.trim import QUALITIES, TRIM, Outputs
from hf_sparsity.core.masks import keep_rows
from hf_sparsity.core.stats import InputStats

UNIT_QUALITIES = ["cosim_flat_cosim", "cosim_dim_cosim", "cosim_sample_cosim", "mse_mse", "mae_mse", "snr_psnr"]
UNIT_QUALITIES += ["psnr_flat_psnr", "psnr_dim_psnr", "psnr_sample_psnr"]


def layer_of(weight, inputs, scores=None, sparsity=0.5, needs=frozenset({SAMPLES})):
    """`inputs` `[samples, in]`, one a sequence."""
    stats = InputStats(needs)
    stats.add(inputs, sequences=len(inputs), last=torch.arange(len(inputs)))
    scores = weight.abs() * inputs.norm(dim=0) if scores is None else scores
    return Layer("block.q", weight, stats=stats, scores=scores, sparsity=sparsity)


def uneven(rows=32, width=48, samples=12):
    """Rows of light and heavy tails."""
    weight = torch.randn(rows, width)
    return weight.sign() * weight.abs() ** torch.linspace(0.3, 3, rows)[:, None], torch.randn(samples, width)


@pytest.mark.parametrize("quality", UNIT_QUALITIES)
@pytest.mark.parametrize("target", ["0.3", "0.5", "0.7", "0.8", "0.9"])
def test_search_equals_the_authors(goldens, target, quality):
    golden = load_file(goldens / "edge/trim_unit.safetensors")
    whole, row = quality.rsplit("_", 1)
    found = TRIM(quality=whole, row_quality=row).search(golden["W"], golden["X"], golden["sorted_idx"], float(target))
    expected = golden[f"rows_{target}_{quality}"]
    # Where little is pruned, the authors' own float32 rounding moves a squared error's rows by 5e-6.
    torch.testing.assert_close(found, expected, atol=6e-6 if row == "mse" else 2e-6, rtol=0)
    assert torch.equal((found * 64).long(), (expected * 64).long())


def test_quality_reached_equals_the_authors(goldens):
    golden = load_file(goldens / "edge/trim_unit.safetensors")
    with safe_open(goldens / "edge/trim_unit.safetensors", "pt") as file:
        info = json.loads(file.metadata()["info"])
    outputs = Outputs(golden["W"], golden["X"], golden["sorted_idx"])
    for key in (f"{t}_{q}" for t in (0.3, 0.7) for q in UNIT_QUALITIES):
        outputs.move(torch.full((40,), float(key[:3])))
        name = key[4:].rsplit("_", 1)[0]
        assert outputs.quality(name) == pytest.approx(info[key]["baseline_metric"], rel=2e-5)
        outputs.move(golden["rows_" + key])
        assert outputs.quality(name) == pytest.approx(info[key]["best_metric"], rel=2e-5)


def test_rows_and_masks_equal_the_authors_on_a_model(goldens):
    weights = load_file(goldens / "models/llama-tiny/model.safetensors")
    inputs, mean_sq, rows, pruned = (
        load_file(goldens / f"llama-tiny/{name}.safetensors")
        for name in (
            "stats/trim_wanda_70_inputs",
            "stats/trim_wanda_70_scaler_row",
            "alloc/trim_wanda_70_row_sparsity",
            "masks/trim_wanda_70",
        )
    )
    differ = total = 0
    for name, expected in rows.items():
        weight = weights[name + ".weight"]
        layer = layer_of(weight, inputs[name].T, scores=weight.abs() * mean_sq[name].sqrt(), sparsity=0.7)
        layer.rows = TRIM().rows(layer)
        assert layer.rows.dtype == torch.float32
        torch.testing.assert_close(layer.rows, expected, atol=2e-6, rtol=0)
        golden = np.unpackbits(pruned[name].numpy(), axis=-1, count=weight.shape[1])
        differ += int((keep_rows(layer.scores, layer.counts) == torch.from_numpy(golden).bool()).sum())
        total += weight.numel()
    assert len(rows) == 28
    assert differ <= 1e-4 * total


def test_outputs_follow_any_move():
    """Small moves, large moves, none, and beyond both ends, against the masked product."""
    weight, inputs = uneven()
    order = (weight.abs()).argsort(dim=1, stable=True)
    outputs = Outputs(weight, inputs.T, order)
    for point in (torch.full((32,), 0.5), torch.rand(32), torch.rand(32) * 0.1 + 0.5, torch.rand(32) * 3 - 1):
        for _ in range(2):
            outputs.move(point)
            counts = (point.clamp(0, 1) * 48).long()
            kept = keep_rows(weight.abs(), counts)
            torch.testing.assert_close(outputs.pruned, (weight * kept) @ inputs.T, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(outputs.wide, outputs.pruned.double())
            assert torch.equal(outputs.counts, counts)


@pytest.mark.parametrize("quality", QUALITIES)
def test_the_search_never_loses_and_keeps_the_mean(quality):
    layer = layer_of(*uneven())
    row = {"cosim": "cosim", "psnr": "psnr", "snr": "psnr"}.get(quality.split("_")[0], "mse")
    trim = TRIM(quality=quality, row_quality=row)
    inputs, order = layer.stats.samples.T, layer.scores.argsort(dim=1, stable=True)
    outputs = Outputs(layer.weight, inputs, order)
    outputs.move(torch.full((32,), 0.5))
    uniform = outputs.quality(quality)
    outputs.move(trim.search(layer.weight, inputs, order, 0.5))
    assert outputs.quality(quality) > uniform
    rows = trim.rows(layer)
    assert float(rows.mean()) == pytest.approx(0.5, abs=1e-6)
    assert float(rows.std()) > 0.001
    assert torch.equal(rows, trim.rows(layer))


def test_rates_are_tried_until_one_is_no_better():
    """The order of rates, when each side stops, and that negative ones wait for the positive to fail."""
    tried = []
    gains = {}

    class Scripted(TRIM):
        def climb(self, outputs, start, *, rate, target):
            tried.append(rate)
            return outputs.quality(self.quality) + gains.get(rate, 0.0), start + rate

    weight, inputs = uneven()
    order = weight.abs().argsort(dim=1)

    def run(**changes):
        tried.clear()
        found = float((Scripted(**changes).search(weight, inputs.T, order, 0.5) - 0.5).mean())
        return list(tried), round(found, 3)

    assert run() == ([0.01, 0.02, -0.01, -0.02], 0.0)
    assert run(negative=False) == ([0.01, 0.02], 0.0)
    gains |= {0.01: 1.0, 0.02: 2.0, 0.04: 2.0, 0.08: 9.0}
    assert run() == ([0.01, 0.02, 0.04], 0.02)
    gains |= {0.01: -2.0, 0.02: -1.0, 0.04: -3.0, -0.01: -1.0, -0.02: 1.0, -0.04: 4.0}
    assert run() == ([0.01, 0.02, 0.04, -0.01, -0.02, -0.04], -0.04)


@pytest.mark.parametrize("row_quality", ["cosim", "mse", "psnr"])
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_dead_inputs_and_rows_give_numbers(row_quality, sparsity):
    weight, inputs = uneven()
    weight[3] = 0
    for x in (inputs, inputs * 0):
        rows = TRIM(row_quality=row_quality).rows(layer_of(weight, x, sparsity=sparsity))
        assert rows.isfinite().all()
        assert float(rows.mean()) == pytest.approx(sparsity, abs=1e-6)


def test_nothing_to_decide():
    weight, inputs = uneven()
    assert torch.equal(TRIM().rows(layer_of(weight, inputs, sparsity=0.0)), torch.zeros(32))
    unseen = Layer("expert", weight, stats=InputStats(frozenset({SAMPLES})), scores=weight.abs(), sparsity=0.5)
    assert torch.equal(TRIM().rows(unseen), torch.full((32,), 0.5))


def test_half_precision_weights_give_float32_rows():
    weight, inputs = uneven()
    half = layer_of(weight.half(), inputs, scores=weight.half().float().abs())
    full = layer_of(weight.half().float(), inputs, scores=half.scores)
    assert torch.equal(TRIM().rows(half), TRIM().rows(full))


def test_what_cannot_be_used_is_said():
    weight, inputs = uneven()
    with pytest.raises(ValueError, match="SAMPLES"):
        TRIM().rows(layer_of(weight, inputs, needs=frozenset({NORMS})))
    missing = layer_of(weight, inputs)
    missing.scores = None
    with pytest.raises(ValueError, match=r"block\.q.*SCORES"):
        TRIM().rows(missing)
    for changes in ({"quality": "pass"}, {"row_quality": "mae"}, {"iterations": 0}, {"cap": 0.0}):
        with pytest.raises(ValueError, match="trim: "):
            TRIM(**changes)


def test_json_round_trip():
    values = json.loads(json.dumps(TRIM(rates=(0.5,)).to_dict()))
    assert values.pop("name") == "trim"
    assert TRIM(**values) == TRIM(rates=(0.5,))
