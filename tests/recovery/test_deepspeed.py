"""DeepSpeed by stand-ins that have its shapes: which stages are refused, and that the float32 copies keep the zeros."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hf_sparsity.model.layers import find_layers
from hf_sparsity.recovery.callback import SparsityCallback
from hf_sparsity.recovery.deepspeed import check_stage, master_parts, uses_deepspeed
from hf_sparsity.recovery.hold import hold_zeros
from hf_sparsity.recovery.zero_masks import ZeroMasks
from tests.recovery.trainers import IDS, sparse, trainer, zeros


def plugin(stage):
    return SimpleNamespace(zero_stage=stage)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, None])
@pytest.mark.parametrize("how", ["plugin", "plugin's config", "dict", "file", "accelerate"])
def test_the_stage_is_found_however_it_was_chosen(how, stage, tmp_path, monkeypatch):
    config = {"zero_optimization": {"stage": stage}}
    args = SimpleNamespace(deepspeed=None, deepspeed_plugin=None)
    if how == "plugin":
        args.deepspeed_plugin = plugin(stage)
    elif how == "plugin's config":
        args.deepspeed_plugin = SimpleNamespace(zero_stage=None, deepspeed_config=config)
    elif how == "dict":
        args.deepspeed = config
    elif how == "file":
        (tmp_path / "zero.json").write_text(json.dumps(config))
        args.deepspeed = str(tmp_path / "zero.json")
    else:
        from accelerate.state import AcceleratorState

        monkeypatch.setattr(AcceleratorState, "_shared_state", {"some": "state"})
        monkeypatch.setattr(AcceleratorState, "__init__", lambda self: None)
        monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin(stage))
    if stage in (0, 1, 2):
        check_stage(sparse(), args)
    else:
        with pytest.raises(ValueError, match="stage 3:" if stage else "cannot be read"):
            check_stage(sparse(), args)


def test_split_parameters_are_refused_without_any_configuration(tmp_path):
    model = sparse()
    args = trainer(model, tmp_path).args
    model.model.layers[0].mlp.up_proj.weight.ds_id = 7
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        SparsityCallback().on_train_begin(args, None, None, model=model)
    with pytest.raises(ValueError, match="ZeRO stage 3"), hold_zeros(model, torch.optim.SGD(model.parameters())):
        pass


class Engine:
    """ZeRO-1 in one process of two: float32 copies of the first half of each parameter are trained, and copied back."""

    def __init__(self, model, share=0.5):
        self.parameters = list(model.parameters())
        self.copies = []
        for parameter in self.parameters:
            count = int(parameter.numel() * share)
            copy = parameter.detach().reshape(-1)[:count].float().clone().requires_grad_()
            address = SimpleNamespace(start=0, numel=count)
            parameter._hp_mapping = SimpleNamespace(lp_fragment_address=address, hp_fragment=copy, optim_fragment={})
            self.copies.append(copy)
            parameter.register_post_accumulate_grad_hook(self.reduce)  # before any mask is there
        self.optimizer = torch.optim.AdamW(self.copies, lr=1e-2, weight_decay=0.1)
        self.reduced = {}

    def reduce(self, parameter):
        self.reduced[id(parameter)] = parameter.grad.clone()  # what is communicated, at once
        parameter.grad = None

    def step(self):
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = self.reduced[id(parameter)].reshape(-1)[: copy.numel()].float()
        self.optimizer.step()
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            parameter._hp_mapping.optim_fragment = {
                key: value for key, value in self.optimizer.state[copy].items() if value.shape == copy.shape
            }
            parameter.data.view(-1)[: copy.numel()] = copy.detach().to(parameter.dtype)


Engine.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


@pytest.mark.parametrize("spoil", [False, True])
def test_zero_1_and_2_keep_the_zeros_in_parameters_copies_and_moments(spoil):
    model = sparse(dtype=torch.bfloat16)
    dead = zeros(model)
    engine = Engine(model)
    assert uses_deepspeed(SimpleNamespace(optimizer=engine)) and not uses_deepspeed(engine.optimizer)
    masks = ZeroMasks(find_layers(model).weights)
    masks.hold(model, SimpleNamespace(optimizer=engine))
    for _ in range(2):
        model(input_ids=IDS[:2], labels=IDS[:2]).loss.backward()
        for name, parameter in model.named_parameters():
            if name in dead:
                assert not engine.reduced[id(parameter)][dead[name]].any(), "masked after it was communicated"
        engine.step()
        if spoil:
            with torch.no_grad():
                for parameter, copy in zip(engine.parameters, engine.copies, strict=True):
                    parameter += 0.1
                    copy += 0.1
                    for moment in parameter._hp_mapping.optim_fragment.values():
                        moment += 1
        masks.apply()
        for name, parameter in model.named_parameters():
            if name in dead:
                gone = dead[name]
                assert not parameter[gone].any()
                parts = list(master_parts(parameter))
                assert len(parts) == 3
                for part, place in parts:
                    assert not part[gone.reshape(-1)[place]].any() and part[~gone.reshape(-1)[place]].any()


def test_without_deepspeed_nothing_is_read():
    assert not list(master_parts(torch.nn.Parameter(torch.ones(2))))
    assert not uses_deepspeed(None)
