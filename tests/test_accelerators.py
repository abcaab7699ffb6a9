"""What the package promises on accelerators, on simulated ones: the results of the CPU, and no more held or moved than need be."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, disk_offload, dispatch_model

from hf_sparsity import BlockReconstruction, SparsityConfig, evaluate_text, make_plan, prune, save_sparse
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.offload import input_device
from hf_sparsity.pruners import PRUNERS
from hf_sparsity.streaming import run, spill
from tests.gpu.measure import Size, measure
from tests.simulated_device import simulated

IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(3, 60, (24, 12), generator=torch.Generator().manual_seed(2))
FEWER = {  # each operation of a simulated device is a call of Python: as few of them as show the way
    "alps": {"rounds": 9},
    "mrp": {"step": 0.5},
    "msp": {"generations": 1, "population": 2, "parents": 1},
}
BOTH = SparsityConfig(0.5, allocator="owl", pruner="sparsegpt")


@pytest.fixture
def devices():
    with simulated(4) as devices:
        yield devices


def small(blocks=2, width=32):
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width + width // 2,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    return model


def blocks_on(*places):
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(outside, places[0]) | {f"model.layers.{i}": place for i, place in enumerate(places)}


def named(table, name):
    return {"name": name, **FEWER.get(name, {})}


def sparsities(plan):
    return {name: layer.sparsity for name, layer in plan.layers.items()}


def carried_out(model, config, **options):
    """The plan, and the weights of the pruned model."""
    plan = make_plan(model, config, IDS)
    prune(model, plan, IDS, **options)
    return plan, {name: value.cpu() for name, value in model.state_dict().items() if not value.is_meta}


@cache
def on_the_cpu(config=BOTH, blocks=2, width=32):
    return carried_out(small(blocks, width), config)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing


def on_a_device_as_on_the_cpu(config):
    plan, expected = on_the_cpu(config, 1, 16)
    again, found = carried_out(small(1, 16).to("sim:1"), config)
    assert_same(found, expected)
    assert sparsities(again) == pytest.approx(sparsities(plan), abs=1e-12)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner(name, devices):
    on_a_device_as_on_the_cpu(SparsityConfig(0.5, pruner=named(PRUNERS, name), refit=name == "wanda"))
    assert devices[0].peak == 0 < devices[1].peak, "nothing is computed on another device than the model's"


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator(name, devices):
    on_a_device_as_on_the_cpu(SparsityConfig(0.5, allocator=named(ALLOCATORS, name), pruner="wanda"))


def test_rows_and_groups(devices):
    on_a_device_as_on_the_cpu(SparsityConfig(0.5, row_allocator={"name": "trim", "iterations": 1}, pruner="wanda"))
    on_a_device_as_on_the_cpu(SparsityConfig(pattern="2:4", pruner="sparsegpt"))


PLACES = {
    "two devices": ("sim:0", "sim:1"),
    "four devices": ("sim:0", "sim:1", "sim:2", "sim:3"),
    "a device and the CPU": (0, "cpu"),
    "two devices, the CPU and the disk": (0, 1, "cpu", "disk"),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_models_on_several_places(places, devices, tmp_path):
    config = SparsityConfig(0.5, allocator="owl", pruner="wanda")
    small(len(places), 16).save_pretrained(tmp_path / "dense")
    options = {"device_map": blocks_on(*places), "offload_folder": str(tmp_path / "offload")}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    carried_out(model, config)
    model.save_pretrained(tmp_path / "sparse")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict()
    assert_same(found, on_the_cpu(config, len(places), 16)[1])


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_that_comes_a_module_at_a_time(where, devices, tmp_path):
    model, there = small(), torch.device("sim:1")
    if where == "cpu":
        cpu_offload(model, execution_device=there)
    else:
        disk_offload(model, str(tmp_path), execution_device=there)
    carried_out(model, BOTH)
    expected = on_the_cpu()[1]
    for name, weight in find_layers(model).weights.items():
        assert torch.equal(weight.module._hf_hook.weights_map[weight.attribute], expected[f"{name}.weight"])


def test_streaming_onto_a_device(devices, tmp_path):
    small().save_pretrained(tmp_path / "dense")
    model = open_streamed(tmp_path / "dense", device="sim:0")
    carried_out(model, BOTH, output_dir=tmp_path / "sparse")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict()
    assert_same(found, on_the_cpu()[1])


@pytest.mark.parametrize("how", ["two devices", "streamed"])
def test_race_and_descent(how, devices, tmp_path):
    race = {"name": "race", "budget": "24 evals", "candidates": ("owl",), "descent": 1}
    config = SparsityConfig(0.5, allocator=race, pruner="wanda")
    expected = make_plan(small(2, 16), config, TEXT)
    assert expected.chosen["descent"]["steps"] == 1
    if how == "streamed":
        small(2, 16).save_pretrained(tmp_path)
        model = open_streamed(tmp_path, device="sim:0")
    else:
        model = dispatch_model(small(2, 16), blocks_on("sim:0", "sim:1"))
    assert sparsities(make_plan(model, config, TEXT)) == pytest.approx(sparsities(expected), abs=1e-12)


def test_reconstruction_on_two_devices(devices):
    """Adam's steps are taken in another order on devices: the same up to rounding."""
    options = {"reconstruct": BlockReconstruction(epochs=1)}
    config = SparsityConfig(0.5, pruner="wanda")
    _, expected = carried_out(small(2, 16), config, **options)
    _, found = carried_out(dispatch_model(small(2, 16), blocks_on("sim:0", "sim:1")), config, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_evaluation_of_models_on_two_devices(devices):
    dense, sparse = small(), small()
    prune(sparse, make_plan(sparse, {"sparsity": 0.5, "pruner": "magnitude"}))
    expected = evaluate_text(sparse, TEXT, dense)
    assert evaluate_text(sparse.to("sim:0"), TEXT, dense.to("sim:1")) == expected


def test_packed_folders_come_straight_to_their_devices(devices, tmp_path):
    model = small().to("sim:2")
    prune(model, make_plan(model, {"pattern": "2:4", "pruner": "magnitude"}))
    expected = {name: value.cpu() for name, value in model.state_dict().items()}
    save_sparse(model, tmp_path, layout="bitmask")
    for places in ("sim:1", blocks_on("sim:0", "sim:1"), blocks_on(0, "cpu")):
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
        found = {name: value.cpu() for name, value in loaded.state_dict().items() if not value.is_meta}
        assert_same(found, {name: expected[name] for name in found})
        assert torch.equal(loaded(TEXT.to(input_device(loaded))).logits.cpu(), model(TEXT.to("sim:2")).logits.cpu())


def test_a_block_a_batch_and_its_statistics_are_held(devices, tmp_path, monkeypatch):
    """Streamed, 5 blocks: no more is held than with 2; the hidden states of waiting batches wait on the host."""
    monkeypatch.setattr(spill, "SMALLEST", 1)
    ids = torch.randint(3, 60, (6, 28), generator=torch.Generator().manual_seed(3))
    peaks = []
    monkeypatch.setattr(run, "SHARE", 1 << 62)  # nothing may stay, as on a device that is nearly full
    for device, blocks in zip(devices, (2, 5), strict=False):
        small(blocks, 16).save_pretrained(tmp_path / str(blocks))
        model = open_streamed(tmp_path / str(blocks), device=f"sim:{device.index}")
        plan = make_plan(model, {"sparsity": 0.5, "pruner": "wanda"})
        device.reset()
        prune(model, plan, ids, output_dir=tmp_path / f"{blocks} sparse")
        peaks.append(device.peak)
        shapes = {weight.size * 4 for weight in find_layers(model).weights.values()}
        there, back = ([copies[size] for size in shapes] for copies in (device.copies_in, device.copies_out))
        assert sum(back) == 7 * blocks, "each weight comes back once"
        assert sum(there) == 2 * 7 * blocks, "and goes there twice: for the first sequence, and to be pruned"
        assert 4 not in device.copies_in, "no number goes along"
    assert peaks[1] <= peaks[0]


def test_a_full_device_makes_room_then_halves_the_batches(devices, caplog, monkeypatch):
    batches = [{"input_ids": TEXT[:8]}, {"input_ids": TEXT[8:16]}]
    config = SparsityConfig(0.5, pruner="wanda")
    expected = small(2, 16)
    prune(expected, make_plan(expected, config), batches)
    model = small(2, 16).to("sim:0")
    plan = make_plan(model, config)
    devices[0].reset()
    prune(copy.deepcopy(model), plan, batches)
    caplog.clear()
    devices[0].room = int(0.75 * devices[0].peak)
    monkeypatch.setattr(run, "SHARE", 1)
    prune(model, plan, batches)
    assert "1/2 of a batch" in caplog.text
    assert_same({n: p.cpu() for n, p in model.state_dict().items()}, expected.state_dict())
    devices[0].room = devices[0].held + 8000
    with pytest.raises(ValueError, match="more memory are needed on sim:0"):
        prune(model, plan, batches)


def check_figures(figures, pruners):
    assert not [name for name, value in figures.items() if isinstance(value, dict) and "error" in value], figures
    assert figures["statistics"] < 1e-3 and figures["training"] > 0.49
    assert all(figures[f"{pruner} {where}"]["seconds"] > 0 for pruner in pruners for where in ("resident", "streamed"))


def test_the_script_for_a_real_device_runs(devices, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "sim:0")
    tiny = Size(32, 48, 2, 2, 64, 2, 12)
    check_figures(measure(tiny, torch.device("sim:0"), ("wanda",)), ("wanda",))


@pytest.mark.gpu
def test_on_a_gpu():
    size = Size(1024, 2816, 4, 8, 1024, 8, 512)
    check_figures(measure(size, torch.device("cuda:0")), ("wanda", "sparsegpt", "alps"))
