"""Does this plan fit this model: names, sizes, patterns, fingerprints."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Pattern, Pruner
from ..allocators import ALLOCATORS
from ..config import SparsityConfig
from ..plan import Plan
from .layers import Layout
from .offload import onload
from .source import source_weights

logger = logging.getLogger(__name__)


def plan_config(plan: Plan, pruner: Pruner | None = None) -> SparsityConfig:
    """The plan's config, with the instances it was made with if they are still at hand.

    The allocator has done its work, so one that is not ours is no obstacle: uniform stands in for it.
    """
    given = dict(plan.config) | {role: value for role, value in plan.algorithms.items() if value is not None}
    if isinstance(allocator := given.get("allocator"), Mapping) and allocator.get("name") not in ALLOCATORS:
        given["allocator"] = "uniform"
    return SparsityConfig.from_dict(given | ({"pruner": pruner} if pruner is not None else {}))


def check_plan(plan: Plan, model: PreTrainedModel, layout: Layout) -> None:
    """`ValueError` when the plan names other layers or sizes than the model has, or misses its target."""
    weights = layout.weights
    missing = [n for n in weights if n not in plan.layers]
    unknown = [n for n in plan.layers if n not in weights]
    if missing or unknown:
        raise ValueError(
            f"the plan was made for another model: of {len(weights)} prunable layers {len(missing)} are not in it"
            f"{f' ({missing[0]}, ...)' if missing else ''}, and {len(unknown)} of its layers are not in the model"
            f"{f' ({unknown[0]}, ...)' if unknown else ''}"
        )
    for name, weight in weights.items():
        if plan.layers[name].size != weight.size:
            raise ValueError(
                f"the plan was made for another model: {name} has {weight.size} weights, in the plan {plan.layers[name].size}"
            )
        pattern = Pattern.parse(plan.layers[name].pattern)
        if pattern.sparsity is not None and abs(pattern.sparsity - plan.layers[name].sparsity) > 1e-6:
            raise ValueError(
                f"the plan's {name} has pattern {pattern} but sparsity {plan.layers[name].sparsity}; {pattern} means {pattern.sparsity:g}"
            )
        if pattern.is_mixed or (pattern.group and weight.shape[1] % pattern.group):
            raise ValueError(f"the plan's {name} has pattern {pattern}, which does not fit its width {weight.shape[1]}")
    plan.check_target()


def model_fingerprint(model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """`{"type", "name", "layers", "weights"}`: names and shapes of the layers, and a sample of their weights, hashed.

    `weights` is None while any layer is offloaded by accelerate, since reading it would load the model; of a streamed
    model they are those of its checkpoint, read once.
    """
    streamed = source_weights(model)
    if streamed is None:
        weights = _sampled(layout)
    else:
        key = tuple(layout.weights)
        if key not in streamed.fingerprints:
            streamed.reads_ahead = False  # it looks at few pages only
            streamed.fingerprints[key] = _sampled(layout, lend=True)
            streamed.reads_ahead = True
        weights = streamed.fingerprints[key]
    return {
        "type": getattr(model.config, "model_type", type(model).__name__),
        "name": getattr(model.config, "_name_or_path", "") or "",
        "layers": shapes_hash(layout),
        "weights": weights,
    }


def shapes_hash(layout: Layout) -> str:
    """The names and shapes of the layers, hashed."""
    shapes = hashlib.sha256()
    for name, weight in layout.weights.items():
        shapes.update(f"{name}{weight.shape}".encode())
    return shapes.hexdigest()


def _sampled(layout: Layout, *, lend: bool = False) -> str | None:
    """Up to 64 values of each parameter, hashed; None if some are not in memory and shall not be lent."""
    values = hashlib.sha256()
    sampled: set[str] = set()
    for block in layout.blocks:
        with onload(block.module) if lend and block.weights else nullcontext():
            for weight in block.weights.values():
                if weight.stored.device.type == "meta":
                    return None
                if weight.parameter not in sampled:
                    sampled.add(weight.parameter)
                    values.update(sample(weight.stored))
    return values.hexdigest()


def sample(parameter: Tensor) -> bytes:
    """At least 64 values, evenly spread (all, if there are fewer), as float64: for a fingerprint."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float64).numpy().tobytes()


def versions() -> dict[str, str]:
    """Versions that could change a result."""
    found = {}
    for package in ("hf_sparsity", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def check_widths(layout: Layout, pattern: Pattern) -> None:
    """`ValueError` when an N:M group does not divide the width of every layer."""
    if pattern.group is None:
        return
    bad = [f"{n} (width {w.shape[1]})" for n, w in layout.weights.items() if w.shape[1] % pattern.group]
    if bad:
        raise ValueError(
            f"pattern {pattern} does not divide the width of {len(bad)} layers: {', '.join(bad[:3])}; choose another group, or ignore them"
        )
