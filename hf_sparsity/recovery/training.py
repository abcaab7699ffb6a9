"""The training inside `recover`: one Trainer run whose checkpoints are recorded when they are whole, so that it can go on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..checkpoint.journal import Journal
from ..model.sparsity import planned_layers
from .callback import SparsityCallback
from .distillation import DistillationTrainer


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train: what `recover` was given, with the defaults filled in."""

    method: str
    steps: int
    batch: int
    length: int
    lr: float
    seed: int
    rank: int
    accumulation: int
    hard: float
    soft: float
    hidden: float
    temperature: float
    training: Mapping[str, Any]


def retrain(model: Any, teacher: Any, rows: Tensor, options: Options, journal: Journal) -> Any:
    """Trains a sparse model in the Trainer, from the last checkpoint if there is one; returns it with its own dtypes."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    arguments = training_arguments(options, journal.folder / "trainer")
    if options.method == "full" or arguments.device.type == "cpu":
        # In 16 bits most updates are smaller than a weight's rounding; and CPUs are slow at it.
        _cast(model, dict.fromkeys(dtypes, torch.float32))
    if options.method == "lora":
        from peft import LoraConfig  # an optional dependency

        from .lora import sparse_lora

        set_seed(options.seed)
        trained: Any = sparse_lora(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **_targets(model)))
        callbacks: list[TrainerCallback] = [_Journaled(journal)]
    else:
        trained, callbacks = model, [SparsityCallback(), _Journaled(journal)]
    trainer = make_trainer(trained, teacher, rows, options, arguments, callbacks)
    trainer.train(resume_from_checkpoint=_last_checkpoint(journal))
    result = trained.merge_and_unload() if options.method == "lora" else trained
    _cast(result, dtypes)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(trains[name])  # peft froze them
    return result.eval()


def _targets(model: Any) -> dict[str, Any]:
    """Every planned layer by its full name; peft's "all-linear" would take routers along and leave fused experts out."""
    weights = planned_layers(model).weights.values()
    experts = sorted({weight.parameter for weight in weights if weight.expert is not None})
    linear = [weight.name for weight in weights if weight.expert is None]
    return {"target_modules": linear} | ({"target_parameters": experts} if experts else {})


def training_arguments(options: Options, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; checkpoints go to `folder`."""
    given: dict[str, Any] = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch // options.accumulation,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.steps // 20,
        "weight_decay": 0.0,
        "save_steps": max(1, options.steps // 10),
        "save_total_limit": 2,  # the last may be cut short by a crash
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": options.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    }
    arguments = TrainingArguments(str(folder), **given | dict(options.training))
    _ = arguments.device
    arguments._n_gpu = min(1, arguments.n_gpu)  # never DataParallel
    return arguments


def make_trainer(
    model: Any,
    teacher: Any,
    rows: Tensor,
    options: Options,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Trainer over `steps * batch` rows: a new order of all rows in each pass over them."""
    order = torch.Generator().manual_seed(options.seed)
    count = options.steps * options.batch
    passes = [torch.randperm(len(rows), generator=order) for _ in range(-(-count // len(rows)))]
    data = [{"input_ids": rows[i], "labels": rows[i]} for i in torch.cat(passes)[:count].tolist()]
    given: dict[str, Any] = {"args": arguments, "train_dataset": data, "callbacks": callbacks}
    if teacher is None:
        trainer = Trainer(model, **given)
    else:
        names = ("hard", "soft", "hidden", "temperature")
        trainer = DistillationTrainer(model, teacher=teacher, **given, **{n: getattr(options, n) for n in names})
    trainer.remove_callback(PrinterCallback)  # standard output is the command's
    return trainer


class _Journaled(TrainerCallback):
    """Records a checkpoint when it is whole, and shows how far the training is."""

    def __init__(self, journal: Journal):
        self.journal, self.bar = journal, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(desc="Recovering", total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.journal.remember("checkpoint", str(state.global_step), True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _last_checkpoint(journal: Journal) -> str | None:
    """The newest whole checkpoint; those that a crash cut short are removed."""
    found: dict[int, Path] = {}
    for path in (journal.folder / "trainer").glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if journal.recall("checkpoint", step):
            found[int(step)] = path
        else:
            shutil.rmtree(path)
    return str(found[max(found)]) if found else None


def _cast(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
