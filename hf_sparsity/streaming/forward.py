"""Run the model's own forward for its statistics: without a cache, in evaluation mode, experts one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.inference import Batch


def padding(batch: Batch, arguments: Mapping[str, Any], *, of_text: bool = True) -> tuple[int, int, list[Tensor]]:
    """Returns (sequences of a batch, tokens of each, masks of its real tokens if any token is padding).

    Args:
        arguments: what the block is called with, by name.
        of_text: whether the block sees the text's tokens; one of a vision or audio tower sees others, and what is known
            of the text says nothing of them: its tokens are 0 and it has no masks.

    The masks are bool `[sequences, tokens]`, to be tried in order against the shape of an input.
    """
    ids = next((batch[k] for k in ("input_ids", "decoder_input_ids") if k in batch), None)
    first = ids if ids is not None else next(v for v in batch.values() if isinstance(v, Tensor))
    if not of_text:
        return first.shape[0], 0, []
    candidates = [batch.get("attention_mask")]
    if arguments.get("encoder_hidden_states") is not None:  # a decoder block that also attends to an encoder
        target = batch.get("decoder_attention_mask")
        if target is None and "decoder_input_ids" in batch:
            target = torch.ones_like(batch["decoder_input_ids"])
        candidates.insert(0, target)
    masks = [mask.bool() for mask in candidates if isinstance(mask, Tensor) and mask.ndim == 2]
    if all(bool(mask.all()) for mask in masks):
        masks = []
    elif len(masks) == 2 and masks[0].shape == masks[1].shape and not torch.equal(*masks):
        raise ValueError(
            "padded encoder and decoder inputs of equal length cannot be told apart: give them different lengths"
        )
    return first.shape[0], 0 if ids is None else ids.shape[1], masks


def drive(model: PreTrainedModel, after_last: Callable[[Batch, Any], None] | None) -> Callable[..., Any]:
    """Returns the forward to run: without cache, and without the head unless its output is wanted."""
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
