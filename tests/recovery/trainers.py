"""Sparse tiny models, and trainers for them."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as transformers_trainer

from hf_sparsity import make_plan, prune
from hf_sparsity.model.layers import find_layers
from tests.conftest import tiny

IDS = torch.randint(3, 120, (24, 16), generator=torch.Generator().manual_seed(3))


DATA = [{"input_ids": row, "labels": row} for row in IDS]


PRUNE = {"sparsity": 0.6, "pruner": "magnitude"}


def sparse(name="llama", dtype=torch.float32, **config):
    model = tiny(name, dtype)
    prune(model, make_plan(model, PRUNE | config))
    return model


def zeros(model):
    """Which planned weights are 0, by parameter: read from the model, not from the callback."""
    names = {weight.parameter for weight in find_layers(model).weights.values()}
    return {n: (p.detach() == 0) for n, p in model.named_parameters() if n in names}


def trainer(model, folder, *callbacks, steps=4, **changes):
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    arguments = TrainingArguments(**(arguments | changes))
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=list(callbacks))


class Cut(Exception):
    """The power fails."""


def call_at(patch, event, function):
    """Lets every Trainer call `function(optimizer step)` at this event, before the callbacks that it was given."""
    method = {event: lambda self, args, state, control, **_: function(state.global_step)}
    observer = type("Observer", (TrainerCallback,), method)
    patch.setattr(transformers_trainer, "DEFAULT_CALLBACKS", [*transformers_trainer.DEFAULT_CALLBACKS, observer])


def cut_after(patch, step, event="on_step_end"):
    def fail(now):
        if now == step:
            raise Cut

    call_at(patch, event, fail)
