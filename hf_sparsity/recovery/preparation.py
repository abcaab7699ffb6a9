"""Everything that `recover` loads and checks before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..calibration.batches import data_fingerprint, prepare_batches
from ..calibration.calibration import calibration_batches
from ..calibration.documents import read_documents
from ..calibration.mixture import SELF, Mixture, sources_in
from ..calibration.positions import default_length
from ..calibration.sequences import packed_rows
from ..checkpoint.journal import digest
from ..config import SparsityConfig
from ..model.accepted import check_model
from ..model.classes import require_next_token, text_config
from ..model.fingerprint import versions, weights_fingerprint
from ..model.loading import find_tokenizer, load_model
from ..model.offload import weight_store
from ..model.sparsity import check_zeros
from ..plan import Plan
from ..pruning.reconstruction import BlockReconstruction
from ..validation import check_number
from .checks import as_plan
from .methods import Distillation, Reconstruction, RecoveryMethod, Training, TrainToSparsity, uses_adapters
from .record import describe
from .teacher import check_lessons, check_teacher, check_weights

HELD_OUT = 16  # one sequence of this many is never trained on,
MOST_HELD_OUT = 128  # up to this number of sequences
LESSONS = (
    "hard",
    "soft",
    "hidden",
    "temperature",
    "top_k",
    "hidden_blocks",
    "store",
)  # options that only a teacher needs


@dataclass(frozen=True)
class Preparation:
    """What a recovery works with: models in memory, a method with its defaults filled in, and token ids `[n, length]`."""

    model: Any
    teacher: Any
    tokenizer: Any
    method: Any
    rows: Tensor  # to train on
    held_out: Tensor  # to measure the loss by
    seed: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.rows.shape[1]

    def facts(self) -> dict[str, Any]:
        """What an interrupted run must share with the one that goes on; the config keeps it as what was done."""
        method = self.method
        trains = isinstance(method, Training)
        used = versions()
        if uses_adapters(method):
            used["peft"] = metadata.version("peft")
        return {
            "method": method.name,
            "options": self._options(),
            "steps": method.steps if trains else None,
            "tokens": method.steps * method.batch * self.length if trains else self.rows.numel(),
            "data": data_fingerprint([{"input_ids": torch.cat([self.rows, self.held_out])}])
            | {"heldout": len(self.held_out)},
            "model": weights_fingerprint(self.model),
            "teacher": describe(self.teacher) if self.teacher is not None else None,
            "versions": used,
        }

    def _options(self) -> dict[str, Any]:
        if isinstance(self.method, Reconstruction):
            assert self.method.blocks is not None
            return {"length": self.length, "seed": self.seed, "reconstruct": self.method.blocks.to_dict()}
        options = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
        options |= {"length": self.length, "seed": self.seed, "training": dict(options["training"])}
        without = {"steps", "tokens"} | (set() if self.teacher is not None else set(LESSONS))
        without |= {name for name in ("top_k", "hidden_blocks", "store", "rank") if not options.get(name)}
        if isinstance(self.method, TrainToSparsity):
            options |= {name: _plain(options[name]) for name in ("plan", "config", "schedule")}
        return {name: value for name, value in options.items() if name not in without}


def prepare(
    model: Any,
    data: Any,
    method: RecoveryMethod,
    *,
    teacher: Any,
    tokenizer: Any,
    length: int | None,
    seed: int,
    **reading: Any,
) -> Preparation:
    """Loads the models, cuts the data into sequences, and checks that all of it fits together.

    The arguments are those of `recover`; `reading` has `auto_class`, by which folders are opened, and the dataset's `column`
    and `split`.
    """
    auto_class = reading.pop("auto_class")
    if isinstance(method, Reconstruction):
        method = dataclasses.replace(method, blocks=_checked_blocks(method.blocks))
    if tokenizer is None and isinstance(model, (str, os.PathLike)):
        tokenizer = find_tokenizer(model)
    if isinstance(method, TrainToSparsity):
        method = _with_plan(method)
    model, teacher = (
        _load_model(model, auto_class, grows=isinstance(method, TrainToSparsity)),
        _load_teacher(teacher, auto_class),
    )
    length = length or (data.shape[1] if isinstance(data, Tensor) else default_length(model, tokenizer))
    check_number("length", length, "[1, inf)", whole=True)
    method = method.resolved(length=length, width=text_config(model.config).hidden_size)
    _check(method, model, teacher)
    writer = model if teacher is None else teacher
    rows, held_out = _split(_sequences(data, tokenizer, method, length, writer, seed, **reading))
    prepare_batches(model, torch.cat([rows, held_out]))  # raises ValueError for ids that the model does not have
    return Preparation(model, teacher, tokenizer, method, rows, held_out, seed)


def _checked_blocks(blocks: Any) -> BlockReconstruction:
    if blocks is not None and not isinstance(blocks, BlockReconstruction):
        raise ValueError(f"reconstruct is a {type(blocks).__name__}; a BlockReconstruction is expected")
    return blocks or BlockReconstruction()


def _with_plan(method: TrainToSparsity) -> TrainToSparsity:
    """Returns the method with a `Plan` or a `SparsityConfig` in place of files and dicts."""
    config = method.config
    config = SparsityConfig.from_dict(config) if isinstance(config, Mapping) else config
    return dataclasses.replace(method, plan=as_plan(method.plan), config=config)


def _plain(value: Any) -> Any:
    """Returns a plan as a hash, and anything else that has a dict as that dict."""
    if isinstance(value, Plan):
        return digest(value.to_dict())
    return value.to_dict() if hasattr(value, "to_dict") else value


def _load_model(model: Any, auto_class: Any, *, grows: bool) -> Any:
    """Returns the model, loaded if it is a folder; raises ValueError unless it has its planned zeros and is in memory.

    `grows`: it becomes sparse in training, so it need not be sparse yet.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_model(model, auto_class=auto_class)
    check_model(model, "trained")
    if weight_store(model) is not None or any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("the model is offloaded or streamed; what is trained must be in memory")
    if not grows or getattr(model.config, "sparsity_config", None) is not None:
        check_zeros(model)
    return model


def _load_teacher(teacher: Any, auto_class: Any) -> Any:
    if isinstance(teacher, (str, os.PathLike)):
        return load_model(teacher, auto_class=auto_class)
    if teacher is not None:
        check_model(teacher, "used as a teacher")
    return teacher


def _check(method: RecoveryMethod, model: Any, teacher: Any) -> None:
    if uses_adapters(method) and importlib.util.find_spec("peft") is None:
        raise ValueError("method='lora' needs peft: pip install 'hf_sparsity[recovery]', or use method='full'")
    require_next_token(
        model, "recover (other models are trained in a Trainer with SparsityCallback)", decoder_only=True
    )
    if teacher is not None:
        check_teacher(model, teacher)
        if isinstance(method, Training):
            check_weights(method.hard, method.soft, method.hidden, method.temperature)
            check_lessons(method.top_k, method.hidden_blocks, method.hidden)
    elif isinstance(method, Distillation):
        raise ValueError("method='distill' trains towards the dense model: pass teacher=")


def _sequences(
    data: Any, tokenizer: Any, method: Any, length: int, writer: Any, seed: int, *, column: str | None, split: str
) -> Tensor:
    """Returns token ids `[n, length]`: the number the method needs, or fewer if the data are short.

    `writer` is the model that writes the samples of a source `"self"`.
    """
    if isinstance(data, Tensor):
        return calibration_batches(data, length=length)
    wanted = math.ceil(method.steps * method.batch * HELD_OUT / (HELD_OUT - 1)) + 1
    if sources_in(data, column) is not None or (isinstance(data, str) and data == SELF):
        options = {"seed": seed, "column": column, "split": split, "model": writer}
        batches = calibration_batches(data, tokenizer, sequences=wanted, length=length, **options)
        return batches.ids if isinstance(batches, Mixture) else batches
    documents = read_documents(data, tokenizer, column, split, seed, random.Random(seed))
    rows = packed_rows(documents, tokenizer, wanted, length)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (rows to train on, rows held out): the last sixteenth is held out, at least one sequence."""
    if len(rows) < 2:
        raise ValueError(
            f"the data fill {len(rows)} sequences; at least one to train on and one to judge by are needed"
        )
    count = min(MOST_HELD_OUT, max(1, len(rows) // HELD_OUT))
    return rows[:-count], rows[-count:]
