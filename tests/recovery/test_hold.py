"""hold_zeros: zeros held in a loop of one's own, whatever wraps the model or the optimizer, and however weights change."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel

from hf_sparsity import hold_zeros, make_plan, measure_sparsity, prune
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.sparsity import check_zeros
from tests.conftest import tiny

IDS = torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(3))


def sparse(name="llama", **config):
    model = tiny(name)
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"} | config))
    return model


def zeros(model):
    return {n: w.read() == 0 for n, w in find_layers(model).weights.items()}


def lost(before, model):
    return sum(int((w.read()[before[n]] != 0).sum()) for n, w in find_layers(model).weights.items())


def step(model, optimizer, backward=torch.Tensor.backward):
    backward(model(input_ids=IDS, labels=IDS).loss)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_plain_loop_keeps_every_zero(name):
    model = sparse(name)
    before, old = zeros(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with hold_zeros(model, optimizer) as masks:
        for _ in range(3):
            step(model, optimizer)
            assert lost(before, model) == 0
        assert masks.sparsity == pytest.approx(measure_sparsity(model).sparsity)
    check_zeros(model)
    assert any((old[n] != p).any() for n, p in model.named_parameters())
    record = model.config.sparsity_config["recovered"]
    assert (record["method"], record["steps"], record["data"]) == ("own loop", 3, None)
    step(model, optimizer)
    assert lost(before, model) > 0, "without it zeros are lost: nothing was tested"


def test_with_accelerate_clipping_and_several_optimizers():
    from accelerate import Accelerator

    model, accelerator = sparse(), Accelerator(cpu=True)
    before, parts = zeros(model), list(model.parameters())
    model, first, second = accelerator.prepare(
        model, torch.optim.SGD(parts[::2], lr=1e-2, momentum=0.9), torch.optim.AdamW(parts[1::2], lr=1e-2)
    )
    with hold_zeros(model, [first, second]):
        for _ in range(2):
            accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
            masked = [model.get_parameter(f"{n}.weight").grad[gone] for n, gone in before.items()]
            assert not any(part.any() for part in masked), "clipping would count what is not trained"
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            first.step(), second.step()
            first.zero_grad(), second.zero_grad()
            assert lost(before, model) == 0
    assert model.config.sparsity_config["recovered"]["steps"] == 2


def test_other_changes_are_masked_before_evaluation_and_in_the_state_dict():
    model = sparse()
    before = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def spoil():
        for parameter in model.parameters():
            parameter.data += 0.01

    with hold_zeros(model, optimizer):
        step(model, optimizer)
        spoil()
        model.eval()(input_ids=IDS)
        assert lost(before, model) == 0
        spoil()
        saved = model.state_dict()
        assert all(not saved[f"{n}.weight"][gone].any() for n, gone in before.items())
    spoil()
    model(input_ids=IDS), model.state_dict()
    assert lost(before, model) > 0, "hooks are left on the model"


class Wrapper(nn.Module):
    """A module around a model, as DDP, sentence-transformers and others make them."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


def test_a_wrapped_model_and_a_model_without_its_head(tmp_path):
    model = sparse()
    before = zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with hold_zeros(Wrapper(model), optimizer):
        step(model, optimizer)
    assert lost(before, model) == 0
    sparse(ignore=("model.layers.0", "o_proj")).save_pretrained(tmp_path)
    body = LlamaModel.from_pretrained(tmp_path)  # its layers are called layers.0, the plan's model.layers.0
    before, optimizer = zeros(body), torch.optim.AdamW(body.parameters(), lr=1e-2)
    with hold_zeros(body, optimizer) as masks:
        body(input_ids=IDS).last_hidden_state.square().mean().backward()
        optimizer.step()
    assert lost(before, body) == 0 and masks.sparsity == pytest.approx(0.6, abs=0.02)
    check_zeros(body)


def test_optimizer_states_of_other_libraries_are_left_alone():
    class Quantized(torch.Tensor):
        """Stands for torchao's 8-bit moments: a subclass that knows only what its library needs."""

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(function)

    model = sparse()
    weight = model.model.layers[0].mlp.up_proj.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    foreign = torch.Tensor._make_wrapper_subclass(Quantized, weight.shape)
    moment = torch.ones_like(weight)
    optimizer.state[weight] = {"exp_avg": foreign, "moment": moment, "step": 3, "parts": [torch.ones(2)]}
    gone = weight == 0
    with hold_zeros(model, optimizer):
        assert not moment[gone].any() and moment[~gone].all()


def test_what_cannot_be_held_is_refused():
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    dense = tiny("llama")
    half = sparse().half()
    for wrong, opt, message in (
        (dense, torch.optim.SGD(dense.parameters(), lr=1e-2), "no zeros to hold"),
        (model, "adamw", "optimizer is a str"),
        (model, [optimizer, None], "optimizer is a NoneType"),
        (half, torch.optim.SGD(half.parameters(), lr=1e-2), "float16"),
        (nn.Linear(2, 2), optimizer, "Linear"),
        (nn.ModuleList([sparse(), sparse()]), optimizer, "ModuleList"),
    ):
        with pytest.raises(ValueError, match=message), hold_zeros(wrong, opt):
            pass
    assert not model._forward_pre_hooks and not model._state_dict_pre_hooks


@pytest.mark.slow
def test_the_example(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples" / "recover_with_accelerate.py"), "--steps", "5", "--heldout", "4"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
