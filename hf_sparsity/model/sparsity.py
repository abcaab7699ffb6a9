"""Count zeros, and compare them with the plan in a model's config."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..plan import LARGEST_DEVIATION, LEAST_ROUNDING, LayerReport, Plan, Report
from .accepted import check_model
from .layers import ModelLayers, find_layers, matches
from .offload import onload


def mask_hash(weight: Tensor) -> str:
    """Returns a hash of the places of a weight's zeros, 32 hex digits: BLAKE2b over its mask `[out, in]`, row by row.

    The mask has one bit a weight, 1 = kept; the first weight is the highest bit of the first byte, and the last byte is
    filled with zeros.
    """
    kept = weight != 0
    bits = np.packbits(kept.numpy()) if kept.device.type == "cpu" else _packed(kept).cpu().numpy()
    return hashlib.blake2b(bits.tobytes(), digest_size=16).hexdigest()


def _packed(kept: Tensor) -> Tensor:
    """Returns a mask as `np.packbits` would, on its device, since an eighth of it travels to the host."""
    flat = kept.reshape(-1).to(torch.uint8)
    lanes = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
    return (lanes << torch.arange(7, -1, -1, device=kept.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def measure_sparsity(
    model: PreTrainedModel,
    ignore: tuple[str, ...] | None = None,
    *,
    include: tuple[str, ...] = (),
    masks: bool = False,
) -> Report:
    """Counts the zeros of every prunable layer.

    Args:
        model: any transformers model, sparse or not.
        ignore: layers that are not counted, see `SparsityConfig`; by default those of the model's plan.
        include: parts that are counted as well, see `SparsityConfig`; only with `ignore`.
        masks: adds a hash of each layer's mask, see `mask_hash`.

    Returns:
        A report: `.sparsity` is the model's, `.layers[name].sparsity` a layer's. What was planned, and the target, are those
        of the model's plan if it has one, else what was counted.

    Raises:
        ValueError: what `find_layers` refuses, or a malformed plan.
    """
    check_model(model, "counted")
    plan = model_plan(model)
    model_layers = planned_layers(model) if ignore is None else find_layers(model, ignore, include)
    layers = {}
    for block in model_layers.blocks:
        with onload(block.module):
            for name, weight in block.weights.items():
                values = weight.read()
                zeros = int((values == 0).sum())
                planned = plan.layers[name].sparsity if plan and name in plan.layers else zeros / weight.size
                layers[name] = LayerReport(zeros, weight.size, planned, mask=mask_hash(values) if masks else None)
    report = Report(0.0, layers, model_layers.skipped)
    return Report(plan.target if plan else report.sparsity, layers, model_layers.skipped)


def model_plan(model: PreTrainedModel) -> Plan | None:
    """Returns the plan in the model's config, or None; raises ValueError when it is malformed.

    Its layers are named as in this model, see `fit_names`.
    """
    stored = getattr(model.config, "sparsity_config", None)
    return None if stored is None else fit_names(Plan.from_dict(stored), model)


def fit_names(plan: Plan, model: PreTrainedModel) -> Plan:
    """Returns the plan with its layers named as in a model that has a head where the plan's had none, or the reverse.

    Models with a head call `model.layers.0` (prefix "model") what those without call `layers.0`. A plan that fits as it
    is, or neither way, is returned unchanged.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    first = next(iter(plan.layers)).split("[")[0]
    if not prefix or _has(model, first):
        return plan
    if first.startswith(prefix) and _has(model, first.removeprefix(prefix)):
        old, new = prefix, ""
    elif _has(model, prefix + first):
        old, new = "", prefix
    else:
        return plan
    layers = {new + name.removeprefix(old): layer for name, layer in plan.layers.items()}
    start = first.removeprefix(old).split(".")[0]  # patterns that begin otherwise, such as "o_proj", are no full names
    modules = [name for name, _ in model.named_modules()]
    config = dict(plan.config)
    for key in ("ignore", "include"):
        patterns = [str(pattern).removeprefix(old) for pattern in config.get(key) or ()]
        patterns = [new + p if p.split(".")[0] == start else p for p in patterns]
        config[key] = [p for p in patterns if any(matches(name, p) for name in modules)]  # not those of a missing head
    return replace(plan, config=config, layers=layers)


def _has(model: PreTrainedModel, name: str) -> bool:
    """Returns whether a module or parameter has this name."""
    owner, _, attribute = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(owner), attribute)
    except AttributeError:
        return False


def planned_layers(model: PreTrainedModel, plan: Plan | None = None) -> ModelLayers:
    """Returns the layers that a plan is about, by default the model's; without a plan, all that can be pruned."""
    plan = plan or model_plan(model)
    if plan is None:
        return find_layers(model)
    return find_layers(model, tuple(plan.config.get("ignore", ())), tuple(plan.config.get("include", ())))


def check_zeros(model: PreTrainedModel) -> None:
    """Raises ValueError unless the model has a plan, and every layer at least the zeros that the plan promises.

    Of a model that was quantized while it was loaded only the plan is looked at: its values are packed.
    """
    plan = model_plan(model)
    if plan is None:
        raise ValueError(
            "this checkpoint has no sparsity plan in its config.json, so it is not a sparse model of ours; "
            "pass sparsity_config=SparsityConfig(...) to make it sparse, or load it with transformers"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        return
    report = measure_sparsity(model)
    different = set(plan.layers) ^ set(report.layers)
    if different:
        raise ValueError(
            f"the plan in config.json is for another model: {len(different)} layers differ, such as {sorted(different)[0]}"
        )
    lost, weights = [], planned_layers(model).weights
    for name, layer in report.layers.items():
        rounding = max(LEAST_ROUNDING, 1 / weights[name].shape[1])  # a row has a whole number of zeros
        if layer.sparsity < layer.planned - LARGEST_DEVIATION - rounding:
            lost.append(f"{name} has {layer.sparsity:.4f} where the plan says {layer.planned:.4f}")
    if lost:
        raise ValueError(
            f"the weights do not have the zeros that their plan promises; {len(lost)} layers differ: {'; '.join(lost[:3])}. "
            "Was the model trained, merged with an adapter, or quantized since?"
        )


def refuse_foreign_plan(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose config has a plan of which not one layer has the zeros: it was another model's.

    A model that was quantized while it was loaded is not looked at.
    """
    plan = model_plan(model)
    if plan is None or getattr(model, "hf_quantizer", None) is not None:
        return
    layers = [layer for layer in measure_sparsity(model).layers.values() if layer.planned]
    if layers and all(layer.sparsity < layer.planned / 2 for layer in layers):
        raise ValueError(
            "the model's config has a sparsity plan, and not one of its layers has the zeros: the config was taken from "
            "another model. Remove the plan (del model.config.sparsity_config), or prune the model"
        )
