"""Batches of the model's inputs, checked, on its device, and without padding where that can be removed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.classes import text_config
from ..model.inference import Batch
from ..model.offload import input_device
from .positions import check_positions
from .sequences import real_span

# What data collators leave in a batch and Trainer takes out of it: no input of a forward without a loss.
_NO_INPUTS = {"label", "label_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length"}
_NO_INPUTS |= {"num_items_in_batch", "return_loss"}
_TEXT = {"input_ids", "attention_mask", "token_type_ids"}  # [sequences, tokens] each
_SOUND = {"input_features", "input_values", "attention_mask"}  # what an encoder of speech reads, one row a sequence
_IGNORED = -100  # the label of tokens that are no text, in all of transformers


def prepare_batches(model: PreTrainedModel, batches: Tensor | Iterable[Mapping[str, Any]]) -> list[Batch]:
    """Checks calibration data and puts it in the form the stream wants, on the model's device.

    Args:
        batches: integer ids `[n, t]`, run one sequence at a time; or an iterable of keyword arguments of the
            model's forward, `{"input_ids": [b, t], "attention_mask": ..., ...}`. Rows of pure text or sound whose real tokens
            are contiguous are cut to them and run one by one, so padding never enters a statistic. Labels become the
            decoder's inputs of an encoder-decoder that has none, and are dropped otherwise; so is what is no input of the
            forward (texts, names, lengths).

    Raises:
        ValueError: nothing given, sequences too short or longer than the model's positions, ids outside the vocabulary,
            not numbers, an input that the model does not have.
    """
    if isinstance(batches, (str, bytes, Mapping)) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    ):
        raise ValueError(
            f"batches must be ids [n, t] or an iterable of dicts, not {type(batches).__name__}; texts go through calibration_batches"
        )
    if isinstance(batches, Tensor):
        if batches.ndim != 2:
            raise ValueError(f"calibration ids must have shape [sequences, tokens], not {list(batches.shape)}")
        batches = [{"input_ids": row[None]} for row in batches]
    parameters = inspect.signature(model.forward).parameters
    vocabulary = getattr(text_config(model.config), "vocab_size", None)
    device = input_device(model)
    prepared: list[Batch] = []
    for number, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch if batch.ndim == 2 else batch[None]}
        if not isinstance(batch, Mapping):
            text = "; texts go through calibration_batches(texts, tokenizer)" if isinstance(batch, str) else ""
            raise ValueError(
                f"calibration batch {number} is a {type(batch).__name__}; a dict of the model's inputs is expected{text}"
            )
        tensors = _with_decoder_inputs(model, _with_mask(model, _inputs(batch, parameters, number)), number)
        if not set(tensors) - {"attention_mask"}:
            raise ValueError(f"calibration batch {number} has no inputs")
        _check_ids(tensors, vocabulary, number)
        for part in _without_padding(tensors, number):
            check_positions(model, part, number)
            prepared.append({name: value.to(device) for name, value in part.items()})
    if not prepared:
        spent = " (a generator can be used once: give a list of its batches)" if isinstance(batches, Iterator) else ""
        raise ValueError(f"the calibration data is empty: give at least one sequence{spent}")
    return prepared


def data_fingerprint(batches: Iterable[Batch]) -> dict[str, Any]:
    """Returns `{"sequences", "tokens", "sha256"}` of prepared batches; equal data give equal values."""
    digest, sequences, tokens = hashlib.sha256(), 0, 0
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].detach().cpu()
            digest.update(f"{name}{list(tensor.shape)}".encode())
            values = tensor.to(torch.float64) if tensor.is_floating_point() else tensor.to(torch.int64)
            digest.update(values.contiguous().numpy().tobytes())
        first = batch.get("input_ids", next(iter(batch.values())))
        sequences += first.shape[0]
        mask = batch.get("attention_mask")
        tokens += int(mask.sum()) if mask is not None and mask.ndim == 2 else first.shape[0] * first.shape[1]
    return {"sequences": sequences, "tokens": tokens, "sha256": digest.hexdigest()}


def _inputs(batch: Mapping[str, Any], parameters: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """Returns the tensors of a batch that the forward takes, and the labels; a single sequence gets its first axis."""
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    tensors: dict[str, Tensor] = {}
    for name, value in batch.items():
        if value is None or (name not in parameters and (name in _NO_INPUTS or name == "token_type_ids")):
            continue
        if name not in parameters and (_is_words(value) or (isinstance(value, (int, float, bool)))):
            continue  # texts and numbers that stand beside the inputs
        if name not in parameters and not takes_more and name not in ("labels", "decoder_input_ids"):
            raise ValueError(
                f"calibration batch {number}: the model has no input {name!r}; its inputs are {', '.join(parameters)}"
            )
        tensors[name] = _tensor(value, name, number)
    main = next((tensors[name] for name in ("input_ids", "decoder_input_ids", "labels") if name in tensors), None)
    if main is not None and main.ndim == 1:
        tensors = {name: value[None] for name, value in tensors.items()}
    return tensors


def _is_words(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_words(value[0])
    return isinstance(value, (str, bytes))


def _with_mask(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch whose rows are padded but have no attention mask with one."""
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or "attention_mask" in tensors:
        return tensors
    config = text_config(model.config)
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    spans = [real_span(row, pad, ends) for row in ids.tolist()]
    if any(span != (0, ids.shape[1]) for span in spans) and all(end - start > 1 for start, end in spans):
        places = torch.arange(ids.shape[1])
        rows = [(places >= start) & (places < end) for start, end in spans]
        tensors["attention_mask"] = torch.stack(rows).to(ids.device, torch.int64)
    return tensors


def _with_decoder_inputs(model: PreTrainedModel, tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Returns a batch without labels; an encoder-decoder's become what its decoder reads, as in training.

    Without labels the decoder reads the encoder's input. The decoder's mask counts the labels that are text.
    """
    labels = tensors.pop("labels", None)
    if not getattr(model.config, "is_encoder_decoder", False):
        return tensors
    if {"decoder_input_ids", "decoder_inputs_embeds"} & set(tensors):
        return tensors
    if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        real = labels != _IGNORED
        tensors["decoder_input_ids"] = _shifted(model, labels, number)
        if not bool(real.all()):  # the start token stands before the first label
            before = torch.ones_like(real[:, :1])
            tensors["decoder_attention_mask"] = torch.cat([before, real[:, :-1]], dim=1).to(torch.int64)
    elif "input_ids" in tensors:
        tensors["decoder_input_ids"] = tensors["input_ids"]
        if "attention_mask" in tensors and tensors["attention_mask"].shape == tensors["input_ids"].shape:
            tensors["decoder_attention_mask"] = tensors["attention_mask"]
    return tensors


def _shifted(model: PreTrainedModel, labels: Tensor, number: int) -> Tensor:
    """Returns labels as the decoder's inputs: the model's own way, or moved right behind its start token."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(own):
        return own(labels=labels)
    config = text_config(model.config)
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
    pad = getattr(config, "pad_token_id", None)
    if start is None:
        raise ValueError(
            f"calibration batch {number}: labels make no inputs of the decoder, since the config has no "
            "decoder_start_token_id; give decoder_input_ids"
        )
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == _IGNORED, start if pad is None else pad)


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
    """Returns a batch as it is if nothing is padding, else its rows cut to their real tokens where they are pure text or sound."""
    for mask, ids in (("attention_mask", "input_ids"), ("decoder_attention_mask", "decoder_input_ids")):
        if mask not in tensors:
            continue
        if tensors[mask].ndim != 2:  # who may look at whom, as the caller has decided it
            return [tensors]
        if bool((tensors[mask] != 0).all()):
            del tensors[mask]
        elif ids in tensors and tensors[mask].shape != tensors[ids].shape:
            raise ValueError(
                f"calibration batch {number}: {mask} {list(tensors[mask].shape)} does not fit {ids} {list(tensors[ids].shape)}"
            )
    mains = {side: main for side in ("", "decoder_") if (main := _main_input(tensors, side))}
    masks = [side for side in mains if f"{side}attention_mask" in tensors]
    count = len(tensors[list(mains.values())[-1]]) if mains else 0
    text = {side + name for side in mains for name in _TEXT} | set(mains.values())
    whole = _SOUND if "decoder_" in mains else set()  # goes with each row as it is
    if not masks or not all(name in text | whole and len(value) == count for name, value in tensors.items()):
        return [tensors]
    cut = []
    for row in range(count):
        part = {name: value[row : row + 1] for name, value in tensors.items() if name not in text}
        for side, main in mains.items():
            tokens = tensors[main]
            real = tensors.get(f"{side}attention_mask", tokens.new_ones(tokens.shape[:2]))[row] != 0
            where = real.nonzero().flatten()
            if len(where) < 2:
                part = {}
                break  # a row of padding
            first, last = int(where[0]), int(where[-1]) + 1
            if last - first != len(where):
                return [tensors]  # holes: the model's own mask has to do
            names = [main, *(side + name for name in _TEXT - {"attention_mask"} if side + name in tensors)]
            part |= {name: tensors[name][row : row + 1, first:last] for name in names}
        if part:
            cut.append(part)
    return cut


def _main_input(tensors: Mapping[str, Tensor], side: str) -> str | None:
    """Returns the input `[sequences, tokens, ...]` that the mask of a side is about: ids, or the sound that an encoder reads."""
    if f"{side}input_ids" in tensors:
        return f"{side}input_ids"
    mask = tensors.get(f"{side}attention_mask")
    names = (f"{side}{name}" for name in ("input_values", "input_features"))
    fitting = (name for name in names if mask is not None and name in tensors and tensors[name].shape[:2] == mask.shape)
    return next(fitting, None)


def batch_tokens(batch: Batch) -> int:
    """Returns the number of tokens of a batch, padding included."""
    return int(next(batch[k] for k in ("decoder_input_ids", "input_ids") if k in batch).numel())
