"""The simulated device refuses what a real one would, and counts right: else the tests on it would say nothing."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, dispatch_model
from torch import nn

from tests.conftest import tiny, tiny_batch
from tests.simulated_device import simulated


@pytest.fixture
def devices():
    with simulated(2) as devices:
        yield devices


def test_tensors_of_two_devices_do_not_meet(devices):
    here, there, host = torch.ones(3, device="sim:0"), torch.ones(3, device="sim:1"), torch.ones(3)
    for one, other in ((here, host), (host, here), (here, there), (host, here.sum())):
        with pytest.raises(RuntimeError, match="same device"):
            one + other
    with pytest.raises(RuntimeError, match="same device"):
        here.add_(host)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="same device"):
        nn.Linear(3, 2)(here)
    with pytest.raises(RuntimeError, match="same device"):
        torch.where(here > 0, here, there)
    assert torch.equal((here * torch.tensor(2.0)).cpu(), host * 2), "a number on the host may go along"
    assert torch.equal(here[torch.tensor([0, 2])].cpu(), host[:2]), "and so may indices"


def test_nothing_reads_it_without_a_copy(devices):
    here = torch.arange(6.0, device="sim:1").view(2, 3)
    for read in (lambda: here.numpy(), lambda: np.asarray(here), lambda: np.packbits(here > 1)):
        with pytest.raises((TypeError, RuntimeError)):
            read()
    assert here.data_ptr() != here._data.data_ptr()
    assert here.untyped_storage().data_ptr() == here.data_ptr() == here[0].data_ptr() != here[1].data_ptr()
    with pytest.raises(RuntimeError, match="integers"):
        here.long() @ here.long().T
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="sim:0", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="no device"):
        torch.ones(2, device="sim:2")
    assert here.cpu().numpy().sum() == 15


def test_what_is_held_and_what_travels_is_counted(devices):
    one, other = devices
    here = torch.zeros(1000).to("sim:0")
    assert one.held == one.peak == one.bytes_in == 4000 and one.copies_in == {4000: 1}
    view, twice = here[10:].view(-1, 10).T, here * 2
    assert one.held == 8000, "a view holds nothing of its own"
    del here, twice
    assert (one.held, one.peak) == (4000, 8000), "but it keeps what it is a view of"
    del view
    moved = torch.ones(8, device="sim:0").to("sim:1", torch.float64)
    assert (one.held, one.bytes_out, other.held, other.bytes_in) == (0, 64, 64, 64)
    assert moved.tolist() == [1.0] * 8 and other.bytes_out == 64
    one.reset()
    values = torch.arange(8, device="sim:0")
    assert values.sum().item() == 28 and bool((values > -1).all()) and float(values[1]) == 1
    assert values[values > 5].tolist() == [6, 7]
    assert one.reads == {"_local_scalar_dense": 3, "index": 1}
    target = torch.zeros(8)
    target.copy_(values)
    assert one.copies_out == {16: 1, 32: 1}
    storage = torch.ones(100, device="sim:0").untyped_storage()
    assert one.held == 464
    storage.resize_(0)
    assert one.held == 64


def test_memory_ends(devices):
    devices[0].room = 5000
    held = torch.zeros(1000, device="sim:0")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        held + 1
    assert devices[0].held == 4000
    assert torch.sim.mem_get_info(0) == (1000, 5000)
    held.add_(1)


def test_it_computes_what_the_cpu_computes(devices):
    dense, ids = tiny("llama"), tiny_batch("llama")["input_ids"]
    expected = dense(ids).logits
    model = copy.deepcopy(dense).to("sim:1")
    assert all(isinstance(p, nn.Parameter) and p.device == torch.device("sim:1") for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids.to("sim:1")).logits.cpu(), expected)
    for one in (dense, model):
        there = ids.to(one.device)
        one(input_ids=there, labels=there).loss.backward()
    for (name, p), q in zip(dense.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.cpu(), p.grad, msg=name)
    assert {p.device.type for p in model.to("cpu").parameters()} == {"cpu"}


def test_it_is_a_device_to_torch(devices):
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 2
    weight = nn.Parameter(torch.ones(2, 3, device="sim:0"))
    again = type(weight)(weight.detach(), requires_grad=False)
    assert (
        isinstance(again, nn.Parameter) and not again.requires_grad and isinstance(copy.deepcopy(weight), nn.Parameter)
    )
    assert not isinstance(weight * 2, nn.Parameter) and (weight * 2).requires_grad
    assert isinstance(type(weight)(torch.empty(2, 3, device="meta")), nn.Parameter)
    weight.data = torch.zeros(2, 3, device="sim:0")
    assert not weight.detach().cpu().any()
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2, device="sim:1")}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["weight"].device == torch.device("sim:1")
    total = torch.zeros(2, device="sim:0")
    assert torch.add(total, 1, out=total) is total and total.sum().item() == 2
    with torch.autocast("sim", torch.bfloat16):
        assert (weight @ weight.T).dtype == torch.bfloat16


def blocks_on(*places):
    """A device map of `tiny("llama")` with its blocks there, and all else on the first."""
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return dict.fromkeys(outside, places[0]) | {f"model.layers.{i}": place for i, place in enumerate(places)}


@pytest.mark.parametrize(
    "places", [("sim:0", "sim:1", "sim:0"), (0, "cpu", 1), ("cpu", "disk", "sim:1"), "auto"], ids=str
)
def test_transformers_and_accelerate_take_it(places, source, devices, tmp_path):
    ids = tiny_batch("llama")["input_ids"]
    options = {"device_map": places, "max_memory": {0: "300KB", 1: "1MB", "cpu": "1MB"}}
    if places != "auto":
        options = {"device_map": blocks_on(*places), "offload_folder": str(tmp_path / "offload")}
    model = hf.AutoModelForCausalLM.from_pretrained(source("llama"), **options)
    assert devices[1].held > 0 and len(set(model.hf_device_map.values())) > 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits.cpu(), tiny("llama")(ids).logits)
    dispatched = dispatch_model(tiny("llama"), blocks_on("sim:0", "sim:1", "sim:1"), force_hooks=True)
    with torch.no_grad():
        assert torch.equal(dispatched(ids).logits.cpu(), tiny("llama")(ids).logits)


def test_offload_leaves_nothing_there(devices):
    ids = tiny_batch("llama")["input_ids"]
    model = tiny("llama")
    cpu_offload(model, execution_device=torch.device("sim:0"))
    buffers = devices[0].held
    with torch.no_grad():
        assert torch.equal(model(ids).logits.cpu(), tiny("llama")(ids).logits)
    assert devices[0].held == buffers and devices[0].bytes_in > sum(p.nbytes for p in tiny("llama").parameters())


def test_the_trainer_takes_it(devices, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "sim:0")
    model = tiny("llama")
    data = [{"input_ids": row, "labels": row} for row in tiny_batch("llama", sequences=4)["input_ids"]]
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_steps": 1,
    }
    options["dataloader_pin_memory"] = False  # the memory of the host that a device reads by itself is not simulated
    trainer = hf.Trainer(model, hf.TrainingArguments(str(tmp_path), **options), train_dataset=data)
    before = model.lm_head.weight.detach().cpu()
    trainer.train()
    assert model.device == torch.device("sim:0") and not torch.equal(model.lm_head.weight.detach().cpu(), before)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
