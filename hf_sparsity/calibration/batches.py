"""Calibration batches: checked, on the model's device, without padding where it can be removed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.classes import text_config
from ..model.inference import Batch
from ..model.offload import input_device

_TEXT = {"input_ids", "attention_mask"}


def prepare_batches(model: PreTrainedModel, batches: Tensor | Iterable[Mapping[str, Any]]) -> list[Batch]:
    """Checks calibration data and puts it in the form the stream wants.

    Args:
        batches: integer ids `[n, t]`, run one sequence at a time; or an iterable of keyword arguments of the
            model's forward, `{"input_ids": [b, t], "attention_mask": ..., ...}`. Labels are dropped. Rows of pure text
            whose real tokens are contiguous are cut to them and run one by one, so padding never enters a statistic.

    Raises:
        ValueError: nothing given, sequences too short, ids outside the vocabulary, not numbers.
    """
    if isinstance(batches, (str, bytes, Mapping)):
        raise ValueError(
            f"batches must be ids [n, t] or an iterable of dicts, not {type(batches).__name__}; texts go through calibration_batches"
        )
    if isinstance(batches, Tensor):
        if batches.ndim != 2:
            raise ValueError(f"calibration ids must have shape [sequences, tokens], not {list(batches.shape)}")
        batches = [{"input_ids": row[None]} for row in batches]
    config = text_config(model.config)
    prepared: list[Batch] = []
    for number, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch if batch.ndim == 2 else batch[None]}
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"calibration batch {number} is a {type(batch).__name__}; a dict of the model's inputs is expected"
            )
        tensors = {k: _tensor(v, k, number) for k, v in batch.items() if v is not None and k not in ("labels", "label")}
        if not set(tensors) - {"attention_mask"}:
            raise ValueError(f"calibration batch {number} has no inputs")
        _check_ids(tensors, getattr(config, "vocab_size", None), number)
        for one in _without_padding(tensors, number):
            if (
                getattr(model.config, "is_encoder_decoder", False)
                and "decoder_input_ids" not in one
                and "input_ids" in one
            ):
                one["decoder_input_ids"] = one["input_ids"]
            prepared.append({k: v.to(input_device(model)) for k, v in one.items()})
    if not prepared:
        raise ValueError("the calibration data is empty: give at least one sequence")
    return prepared


def data_fingerprint(batches: Iterable[Batch]) -> dict[str, Any]:
    """`{"sequences", "tokens", "sha256"}` of prepared batches; equal data give equal values."""
    digest, sequences, tokens = hashlib.sha256(), 0, 0
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].detach().cpu()
            digest.update(f"{name}{list(tensor.shape)}".encode())
            values = tensor.to(torch.float64) if tensor.is_floating_point() else tensor.to(torch.int64)
            digest.update(values.contiguous().numpy().tobytes())
        first = batch.get("input_ids", next(iter(batch.values())))
        sequences += first.shape[0]
        tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else first.shape[0] * first.shape[1]
    return {"sequences": sequences, "tokens": tokens, "sha256": digest.hexdigest()}


def _tensor(value: Any, name: str, number: int) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"calibration batch {number}: {name} cannot be made a tensor: {error}") from None


def _check_ids(tensors: Mapping[str, Tensor], vocabulary: int | None, number: int) -> None:
    for name in ("input_ids", "decoder_input_ids"):
        ids = tensors.get(name)
        if ids is None:
            continue
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"calibration batch {number}: {name} must be integers [sequences, tokens], not {ids.dtype} {list(ids.shape)}"
            )
        if ids.shape[0] == 0 or ids.shape[1] < 2:
            raise ValueError(
                f"calibration batch {number}: {name} has shape {list(ids.shape)}; sequences of at least 2 tokens are needed"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ValueError(
                f"calibration batch {number}: {name} has ids from {low} to {high}, but the model's vocabulary is [0, {vocabulary}): "
                "were they made by another tokenizer?"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"calibration batch {number}: {name} has NaN or infinite values")


def _without_padding(tensors: dict[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    mask = tensors.get("attention_mask")
    if mask is None or bool((mask != 0).all()):
        tensors.pop("attention_mask", None)
        return [tensors]
    if mask.shape != tensors.get("input_ids", mask).shape:
        raise ValueError(
            f"calibration batch {number}: attention_mask {list(mask.shape)} does not fit input_ids {list(tensors['input_ids'].shape)}"
        )
    if not set(tensors) <= _TEXT:
        return [tensors]
    cut = []
    for row, real in zip(tensors["input_ids"], mask != 0, strict=True):
        where = real.nonzero().flatten()
        if len(where) < 2:
            continue  # a row of padding
        if int(where[-1] - where[0]) + 1 != len(where):
            return [tensors]  # holes: the model's own mask has to do
        cut.append({"input_ids": row[where[0] : where[-1] + 1][None]})
    return cut


def batch_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding included."""
    return int(next(batch[k] for k in ("decoder_input_ids", "input_ids") if k in batch).numel())
