"""Count zeros, and compare them with the plan in a model's config."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..plan import LARGEST_DEVIATION, LayerReport, Plan, Report
from .accepted import check_model
from .layers import ModelLayers, find_layers
from .offload import onload


def mask_hash(weight: Tensor) -> str:
    """Returns a hash of the places of a weight's zeros, 32 hex digits: BLAKE2b over its mask `[out, in]`, row by row.

    The mask has one bit a weight, 1 = kept; the first weight is the highest bit of the first byte, and the last byte is
    filled with zeros.
    """
    bits = np.packbits((weight != 0).cpu().numpy())
    return hashlib.blake2b(bits.tobytes(), digest_size=16).hexdigest()


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
    """Returns the plan in the model's config, or None; raises ValueError when it is malformed."""
    stored = getattr(model.config, "sparsity_config", None)
    return None if stored is None else Plan.from_dict(stored)


def planned_layers(model: PreTrainedModel, plan: Plan | None = None) -> ModelLayers:
    """Returns the layers that a plan is about, by default the model's; without a plan, all that can be pruned."""
    plan = plan or model_plan(model)
    if plan is None:
        return find_layers(model)
    return find_layers(model, tuple(plan.config.get("ignore", ())), tuple(plan.config.get("include", ())))


def check_zeros(model: PreTrainedModel) -> None:
    """Raises ValueError unless the model has a plan, and every layer at least the zeros that the plan promises."""
    plan = model_plan(model)
    if plan is None:
        raise ValueError(
            "this checkpoint has no sparsity plan in its config.json, so it is not a sparse model of ours; "
            "pass sparsity_config=SparsityConfig(...) to make it sparse, or load it with transformers"
        )
    report = measure_sparsity(model)
    different = set(plan.layers) ^ set(report.layers)
    if different:
        raise ValueError(
            f"the plan in config.json is for another model: {len(different)} layers differ, such as {sorted(different)[0]}"
        )
    lost, weights = [], planned_layers(model).weights
    for name, layer in report.layers.items():
        rounding = max(0.01, 1 / weights[name].shape[1])  # a row has a whole number of zeros
        if layer.sparsity < layer.planned - LARGEST_DEVIATION - rounding:
            lost.append(f"{name} has {layer.sparsity:.4f} where the plan says {layer.planned:.4f}")
    if lost:
        raise ValueError(
            f"the weights do not have the zeros that their plan promises; {len(lost)} layers differ: {'; '.join(lost[:3])}. "
            "Was the model trained, merged with an adapter, or quantized since?"
        )
