"""The training inside `recover`: one Trainer run whose checkpoints are recorded when they are whole, so that it can go on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..checkpoint.journal import Journal
from ..model.sparsity import planned_layers
from ..progress import Bar
from .callback import SparsityCallback
from .distillation import DistillationTrainer
from .methods import TrainToSparsity, uses_adapters
from .stored_logits import store_logits
from .teacher import Teacher


def retrain(model: Any, teacher: Any, rows: Tensor, method: Any, seed: int, journal: Journal) -> Any:
    """Trains a sparse model in the Trainer, from the last checkpoint if there is one.

    Args:
        model: the sparse model, changed in place.
        teacher: the dense model to distil from, or None.
        rows: token ids `[n, length]` to train on.
        method: one that trains, with its defaults filled in; of `TrainToSparsity` also the plan.
        seed: decides the order of the rows and the adapters' first values.
        journal: the record of the run; checkpoints lie beside it.

    Returns:
        The model with its zeros, without adapters, in the dtypes it had.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    arguments = training_arguments(method, seed, journal.folder / "trainer")
    lora = uses_adapters(method)
    if not lora or arguments.device.type == "cpu":
        # In 16 bits most updates are smaller than a weight's rounding; and CPUs are slow at it.
        _cast(model, dict.fromkeys(dtypes, torch.float32))
    callbacks: list[TrainerCallback] = [_Checkpoints(journal)]
    if lora:
        trained = _with_adapters(model, method.rank, seed)
    else:
        grows = isinstance(method, TrainToSparsity)
        callback = SparsityCallback(plan=method.plan, schedule=method.schedule) if grows else SparsityCallback()
        trained, callbacks = model, [callback, *callbacks]
    if teacher is not None and method.store:
        teacher = store_logits(
            teacher, rows, journal.folder / "teacher", top_k=method.top_k, temperature=method.temperature
        )
    trainer = make_trainer(trained, teacher, rows, method, arguments, callbacks)
    trainer.train(resume_from_checkpoint=_last_checkpoint(journal))
    result = trained.merge_and_unload() if lora else trained
    _cast(result, dtypes)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(trains[name])  # peft froze them
    return result.eval()


def _with_adapters(model: Any, rank: int, seed: int) -> Any:
    """Returns a PeftModel with masked adapters on every planned layer.

    The layers are given by their full names: peft's "all-linear" would include routers and leave fused experts out.
    """
    from peft import LoraConfig  # an optional dependency

    from .lora import sparse_lora

    set_seed(seed)
    weights = planned_layers(model).weights.values()
    experts = sorted({weight.parameter for weight in weights if weight.expert is not None})
    targets: dict[str, Any] = {"target_modules": [weight.name for weight in weights if weight.expert is None]}
    if experts:
        targets["target_parameters"] = experts
    return sparse_lora(model, LoraConfig(r=rank, lora_alpha=2 * rank, **targets))


def training_arguments(method: Any, seed: int, folder: Path) -> TrainingArguments:
    """Returns the Trainer's arguments; checkpoints go to `folder`."""
    options: dict[str, Any] = {
        "max_steps": method.steps,
        "per_device_train_batch_size": method.batch // method.accumulation,
        "gradient_accumulation_steps": method.accumulation,
        "learning_rate": method.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": method.steps // 20,
        "weight_decay": 0.0,
        "save_steps": max(1, method.steps // 10),
        "save_total_limit": 2,  # the last may be cut short by a crash
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    }
    arguments = TrainingArguments(str(folder), **options | dict(method.training))
    _ = arguments.device  # sets the number of devices,
    arguments._n_gpu = min(1, arguments.n_gpu)  # of which one is used: DataParallel copies the masks' parameters
    return arguments


def make_trainer(
    model: Any,
    teacher: Any,
    rows: Tensor,
    method: Any,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Returns a Trainer over `steps * batch` rows, which come in a new order in each pass over all of them."""
    order = torch.Generator().manual_seed(arguments.seed)
    count = method.steps * method.batch
    passes = [torch.randperm(len(rows), generator=order) for _ in range(-(-count // len(rows)))]
    data = [{"input_ids": rows[i], "labels": rows[i]} for i in torch.cat(passes)[:count].tolist()]
    options: dict[str, Any] = {"args": arguments, "train_dataset": data, "callbacks": callbacks}
    if teacher is None:
        trainer = Trainer(model, **options)
    else:
        lessons = {name: getattr(method, name) for name in ("hard", "soft", "hidden", "temperature", "top_k")}
        taught = Teacher(teacher, blocks=method.hidden_blocks, **lessons)
        trainer = DistillationTrainer(model, teacher=taught, **options)
    trainer.remove_callback(PrinterCallback)  # standard output is the command's
    return trainer


class _Checkpoints(TrainerCallback):
    """Records in the journal each checkpoint that is whole, and shows a progress bar."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = Bar("Recovering", state.max_steps, "step", done=state.global_step, shown=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.journal.remember("checkpoint", str(state.global_step), True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__()


def _last_checkpoint(journal: Journal) -> str | None:
    """Returns the newest whole checkpoint, or None; those that a crash cut short are removed."""
    whole: dict[int, Path] = {}
    for path in (journal.folder / "trainer").glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if journal.recall("checkpoint", step):
            whole[int(step)] = path
        else:
            shutil.rmtree(path)
    return str(whole[max(whole)]) if whole else None


def _cast(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
