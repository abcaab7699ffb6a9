"""What may be trained with its zeros held, checked before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.accepted import check_kind, refuse_quantized
from ..model.layers import ModelLayers
from ..model.sparsity import planned_layers
from ..plan import LARGEST_DEVIATION, LEAST_ROUNDING, Plan
from ..planning.checks import check_plan
from .deepspeed import check_stage
from .zero_masks import ZeroMasks

TOLERANCE = LARGEST_DEVIATION + LEAST_ROUNDING  # sparsity that a layer may lack, as when a sparse model is loaded


def check_supported(model: Any, args: Any = None, optimizer: Any = None) -> None:
    """Raises ValueError for a model whose weights cannot be trained with masks, with the reason and what to do.

    Args:
        model: the model that trains, without wrappers.
        args: `TrainingArguments`, if there are any.
        optimizer: the prepared optimizer, if there is one.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "SparsityCallback holds the zeros of weights that train, but in a PeftModel the base is frozen. "
            "Use sparse_lora(model, LoraConfig(...)) without this callback: its adapters keep every zero"
        )
    check_kind(model)
    refuse_quantized(model, "trained")
    check_stage(model, args, optimizer)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 flattens parameters, so that masks do not fit them; use FSDP2 (fsdp_version: 2)")
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half and not _has_master(model, half[0]):
        raise ValueError(
            f"{half[0]} trains in float16, whose updates underflow without a loss scaler over float32 weights: load the "
            "model with dtype=torch.float32 and fp16=True, or in bfloat16"
        )


def unwrapped(model: Any) -> Any:
    """Returns the transformers model inside what torch.compile, DDP, accelerate or another library put around it.

    A `PeftModel`, or a module around several models, is returned as it is.
    """
    if hasattr(model, "peft_config") or not isinstance(model, nn.Module):
        return model
    inner: list[PreTrainedModel] = []
    for module in model.modules():
        if hasattr(module, "peft_config"):
            return module
        if isinstance(module, PreTrainedModel) and not any(module is part for m in inner for part in m.modules()):
            inner.append(module)
    return inner[0] if len(inner) == 1 else model


def fitting_layers(model: PreTrainedModel, plan: Plan | None) -> ModelLayers:
    """Returns the layers that a plan is about, all of them without one; raises ValueError if the plan does not fit."""
    model_layers = planned_layers(model, plan)
    if plan is not None:
        # Without the hash of the weights, which are the dense ones': every pruned model would be warned about.
        check_plan(replace(plan, model={**plan.model, "weights": None}), model, model_layers)
    return model_layers


def check_has_zeros(masks: ZeroMasks, plan: Plan | None) -> None:
    """Raises ValueError for a dense model, or one with fewer zeros than its plan says."""
    if masks.sparsity == 0:
        raise ValueError(
            "the model has no zeros to hold: prune it first, or pass SparsityCallback(config, schedule='cubic') to prune "
            "it while it trains"
        )
    if plan is None:
        return
    for name, mask in masks.parameters.items():
        planned = sum(plan.layers[w.name].sparsity * w.size for w in mask.weights) / mask.size
        if mask.zeros / mask.size < planned - TOLERANCE:
            raise ValueError(
                f"{name} has a sparsity of {mask.zeros / mask.size:.4f} where the plan says {planned:.4f}. Was the model "
                "trained without this callback, or merged with an adapter, since it was pruned?"
            )


def sparsities(masks: ZeroMasks) -> dict[str, float]:
    """Returns the sparsity of each layer that has zeros; every process must call it."""
    shares: dict[str, float] = {}
    for mask in masks.parameters.values():
        if mask.zeros:
            shares |= {weight.name: float(part.float().mean()) for weight, part in mask.views(mask.whole()[1])}
    return {name: share for name, share in shares.items() if share}


def as_plan(plan: Plan | Mapping[str, Any] | Any | None) -> Plan | None:
    """Returns a plan from a plan, its dict or its file; None stays None."""
    if plan is None or isinstance(plan, Plan):
        return plan
    return Plan.from_dict(plan) if isinstance(plan, Mapping) else Plan.load(plan)


def _has_master(model: nn.Module, name: str) -> bool:
    return getattr(model.get_parameter(name), "_hp_mapping", None) is not None
