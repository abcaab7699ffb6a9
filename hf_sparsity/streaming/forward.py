"""Run the model's own forward for its statistics: without a cache, in evaluation mode, experts one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.inference import Batch
from ..model.layers import ModelLayers
from ..model.offload import weight_store


def padding(batch: Batch, kwargs: Mapping[str, Any]) -> tuple[int, int, list[Tensor]]:
    """(sequences, tokens of each, masks of real tokens to try in order if any token is padding)."""
    ids = next((batch[k] for k in ("input_ids", "decoder_input_ids") if k in batch), None)
    first = ids if ids is not None else next(v for v in batch.values() if isinstance(v, Tensor))
    given = [batch.get("attention_mask")]
    if kwargs.get("encoder_hidden_states") is not None:  # a decoder block that also attends to an encoder
        target = batch.get("decoder_attention_mask")
        if target is None and "decoder_input_ids" in batch:
            target = torch.ones_like(batch["decoder_input_ids"])
        given.insert(0, target)
    masks = [mask.bool() for mask in given if isinstance(mask, Tensor) and mask.ndim == 2]
    if all(bool(mask.all()) for mask in masks):
        masks = []
    elif len(masks) == 2 and masks[0].shape == masks[1].shape and not torch.equal(*masks):
        raise ValueError(
            "padded encoder and decoder inputs of equal length cannot be told apart: give them different lengths"
        )
    return first.shape[0], 0 if ids is None else ids.shape[1], masks


def drive(model: PreTrainedModel, after_last: Callable[[Batch, Any], None] | None) -> Callable[..., Any]:
    """The forward to run: without cache, and without the head unless its output is wanted."""
    whole = model
    base = getattr(model, "base_model", model) if after_last is None else model
    signatures = {id(m): inspect.signature(m.forward).parameters for m in (base, whole)}

    def takes(module: nn.Module, name: str) -> bool:
        parameters = signatures[id(module)]
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def forward(**batch: Any) -> Any:
        module = base if all(takes(base, name) for name in batch) else whole
        extra = {"use_cache": False} if takes(module, "use_cache") else {}
        output = module(**batch, **extra)
        if after_last is not None:
            after_last(batch, output)
        return output

    return forward


def known_order(model: PreTrainedModel, model_layers: ModelLayers, batch: Batch) -> list[int]:
    """`visits`, taken once for a streamed model, which it has to read for that."""
    streamed = weight_store(model)
    if streamed is None:
        return visits(model, model_layers, batch)
    if streamed.order is None:
        streamed.order = visits(model, model_layers, batch)
    return streamed.order


def visits(model: PreTrainedModel, model_layers: ModelLayers, batch: Batch) -> list[int]:
    """Indices of the blocks in the order in which the first sequence visits them.

    Raises:
        ValueError: the model's output is NaN or infinite, so no statistic would mean anything.
    """
    order: list[int] = []
    hooks = [
        block.module.register_forward_pre_hook(lambda *_, index=index: order.append(index))
        for index, block in enumerate(model_layers.blocks)
    ]
    try:
        with torch.no_grad():
            output = drive(model, None)(**{name: value[:1] for name, value in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    first = output if isinstance(output, Tensor) else output[0]
    if isinstance(first, Tensor) and not torch.isfinite(first).all():
        raise ValueError(
            f"the model's output is NaN or infinite on the calibration data in {first.dtype}: "
            "load it in bfloat16 or float32, or check the checkpoint"
        )
    return order
