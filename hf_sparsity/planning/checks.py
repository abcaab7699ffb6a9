"""Checks that a plan fits a model: names, sizes and patterns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..algorithm import Pattern, Pruner
from ..allocators import ALLOCATORS
from ..config import SparsityConfig
from ..model.inference import Batch, prepared
from ..model.layers import ModelLayers
from ..plan import Plan
from ..streaming.first_pass import first_pass

logger = logging.getLogger(__name__)


def plan_config(plan: Plan, pruner: Pruner | None = None) -> SparsityConfig:
    """The plan's config, with the instances it was made with if they are still at hand.

    The allocator has done its work, so one that is not ours is no obstacle: uniform stands in for it.

    Raises:
        ValueError: something that is no plan, or no pruner.
    """
    if not isinstance(plan, Plan):
        raise ValueError(
            f"plan is a {type(plan).__name__}; a Plan is expected: make_plan(model, config, batches), or Plan.load(file)"
        )
    settings = dict(plan.config) | {role: value for role, value in plan.algorithms.items() if value is not None}
    if isinstance(allocator := settings.get("allocator"), Mapping) and allocator.get("name") not in ALLOCATORS:
        settings["allocator"] = "uniform"
    if pruner is not None and not isinstance(pruner, Pruner):
        raise ValueError(f"pruner={pruner!r}: an instance is expected, such as SparseGPT(), or None for the plan's own")
    if pruner is not None and pruner.takes_zeros:
        settings["row_allocator"] = None
    return SparsityConfig.from_dict(settings | ({"pruner": pruner} if pruner is not None else {}))


def check_plan(plan: Plan, model: PreTrainedModel, model_layers: ModelLayers) -> None:
    """Raises ValueError when the plan names other layers or sizes than the model has, or misses its target."""
    weights = model_layers.weights
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


def check_unseen(
    model: PreTrainedModel, model_layers: ModelLayers, data: Sequence[Batch], allowed: float
) -> dict[str, str]:
    """Returns the layers whose inputs the first sequence does not show, with the reasons; {} without data.

    Raises:
        ValueError: they hold more than the `allowed` share of the prunable weights.
    """
    if not data:
        return {}
    with prepared(model):
        first = first_pass(model, model_layers, data)
    first.check(model_layers, allowed)
    return first.unseen


def warn_of_unseen(unseen: Mapping[str, str]) -> None:
    """Logs which layers were measured by magnitude only, and why."""
    for reason in dict.fromkeys(unseen.values()):
        names = [name for name in unseen if unseen[name] == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.warning("measured by magnitude only: %s%s: %s", ", ".join(names[:3]), more, reason)


def check_widths(model_layers: ModelLayers, pattern: Pattern) -> None:
    """Raises ValueError when an N:M group does not divide the width of every layer."""
    if pattern.group is None:
        return
    bad = [f"{n} (width {w.shape[1]})" for n, w in model_layers.weights.items() if w.shape[1] % pattern.group]
    if bad:
        raise ValueError(
            f"pattern {pattern} does not divide the width of {len(bad)} layers: {', '.join(bad[:3])}; choose another group, or ignore them"
        )
