"""Gradual pruning: zeros introduced while a model trains, a few more at a time, until the plan is met.

Zhu & Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, equation 1 (the cubic schedule). Masks only
grow, so a pruned weight stays pruned, unless `regrow` swaps some until the end (`Gradual`). The last update uses the pruner's
own rule at the plan's own sparsity: a layer ends with as many zeros as `prune` would give it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import NORMS, Layer, Pattern, Pruner
from ..config import SparsityConfig
from ..core.budget import HIGHEST
from ..distributed import sum_over_processes
from ..model.layers import Weight
from ..plan import LayerPlan, Plan
from ..planning.checks import plan_config
from ..planning.make_plan import make_plan
from ..pruners.magnitude import Magnitude
from ..pruners.wanda import Wanda
from .checks import sparsities
from .running_norms import RunningNorms
from .schedules import Gradual, steps_of
from .second_moment import second_moment
from .zero_masks import ParameterMask, ZeroMasks

SCHEDULES = {
    # share of the schedule that is over, in [0, 1] -> share of the sparsity still to come
    "cubic": lambda over: (1 - over) ** 3,
    "linear": lambda over: 1 - over,
}


@dataclass(frozen=True)
class Schedule:
    """When masks grow, in optimizer steps, and how far: at `start`, every `interval` steps after, and at `end`."""

    kind: str
    start: int
    end: int
    interval: int

    def is_due(self, step: int) -> bool:
        """Returns whether masks change after this step."""
        return self.start <= step <= self.end and (step == self.end or (step - self.start) % self.interval == 0)

    def over(self, step: int) -> float:
        """Returns the share of the schedule that is over after this step."""
        return min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)

    def left(self, step: int) -> float:
        """Returns the share of the sparsity that is still to come after this step."""
        return float(SCHEDULES[self.kind](self.over(step)))

    def at(self, step: int, first: float, last: float) -> float:
        """Returns the sparsity, after this step, of a layer that goes from `first` to `last`."""
        return last + (first - last) * self.left(step) if self.over(step) < 1 else last


def gradual_pruner(plan: Plan, scores: str | None = None) -> Pruner:
    """Returns the pruner that scores weights while they train, and chooses among the scores.

    Args:
        plan: of which the pruner is taken where `scores` is None.
        scores: see `Gradual`. Those by the second moment are compared as magnitude's are.

    Raises:
        ValueError: a pruner that changes survivors too, or a row allocator.
    """
    config = plan_config(plan)
    if config.row_allocator is not None:
        raise ValueError("gradual pruning has no row allocator: use row_allocator=None")
    if scores is not None and scores != getattr(config.pruner, "name", None):
        return Wanda() if scores == "wanda" else Magnitude()
    pruner = config.pruner
    if isinstance(pruner, Magnitude) or (isinstance(pruner, Wanda) and not pruner.variant):
        return pruner
    raise ValueError(
        f"gradual pruning scores weights by pruner 'magnitude' or 'wanda' (variant=False), not {getattr(pruner, 'name', pruner)!r}: "
        "other pruners change survivors too, which training does here. For a plan that was made for another pruner choose the "
        "scores: schedule=Gradual(scores='magnitude')"
    )


class GradualPruning:
    """Grows masks along a schedule.

    Args:
        plan: what to prune to.
        masks: the model's masks, replaced by larger ones at each update.
        schedule: when, and how far.
        first: sparsity of each layer at the start of the run; what is not named began dense.
        options: scores, regrowth and reallocation; by default those of the plan's pruner, without either.
        total: optimizer steps of the run, which shares of it in `options` are of.

    Raises:
        ValueError: what `gradual_pruner` refuses; sharded weights where whole ones are needed; budgets that cannot be decided
            anew.
    """

    def __init__(
        self,
        plan: Plan,
        masks: ZeroMasks,
        schedule: Schedule,
        first: Mapping[str, float],
        options: Gradual | None = None,
        total: int = 0,
    ):
        self.plan, self.masks, self.schedule, self.first = plan, masks, schedule, dict(first)
        self.options = options or Gradual()
        self.pruner = gradual_pruner(plan, self.options.scores)
        self.norms: RunningNorms | None = None
        if masks.is_sharded and (self.options.regrow or self.options.scores == "fisher"):
            raise ValueError("regrowth and scores='fisher' need whole weights; with FSDP use scores='magnitude'")
        if NORMS in self.pruner.needs:
            if masks.is_sharded:
                raise ValueError("gradual pruning by wanda needs whole weights; with FSDP use pruner='magnitude'")
            self.norms = RunningNorms([w for mask in masks.parameters.values() for w in mask.weights])
        self.turns = self._turns(total)

    def is_due(self, step: int) -> bool:
        """Returns whether masks change after this step."""
        return self.schedule.is_due(step)

    def before(self, step: int) -> None:
        """Has the gradients of pruned weights collected for an update after the step that now begins, if they may regrow."""
        wanted = self._swapped(step) > 0 and self.is_due(step)
        for mask in self.masks.parameters.values():
            mask.collect(wanted)

    @torch.no_grad()
    def update(self, step: int, model: PreTrainedModel, optimizer: Any = None) -> None:
        """Prunes what the schedule wants pruned after this step."""
        if self.norms is not None:
            self.norms.observe(model)
        for mask in self.masks.parameters.values():
            self._update(mask, step, optimizer)
        if step in self.turns:
            self.masks.apply()
            self.reallocate(step, model)

    def reached(self, step: int) -> Plan:
        """Returns the plan at the end of the schedule; before, one that says what each layer has reached."""
        if step >= self.schedule.end:
            return self.plan
        shares = sparsities(self.masks)
        layers = {n: LayerPlan(shares.get(n, 0.0), layer.size) for n, layer in self.plan.layers.items()}
        config = {**self.plan.config, "pattern": "unstructured"}
        plan = replace(self.plan, config=config, layers=layers, chosen=None, story=None)
        return replace(plan, config={**config, "sparsity": plan.sparsity})

    # ---- which weights

    def _update(self, mask: ParameterMask, step: int, optimizer: Any) -> None:
        values, pruned = mask.whole()
        moments: Iterable[tuple[Any, Any]]
        gradients: Iterable[tuple[Any, Any]]
        moment = self._moment(mask, optimizer)
        moments = mask.views(moment) if moment is not None else ((None, None) for _ in mask.weights)
        wanted = self._regrowth(mask)
        gradients = mask.views(wanted) if wanted is not None else ((None, None) for _ in mask.weights)
        result = pruned.clone()
        for (weight, part), (_, zero), (_, steep), (_, gradient) in zip(
            mask.views(values), mask.views(result), moments, gradients, strict=True
        ):
            kept = self._kept(weight, part, zero, steep, gradient, step)
            zero.copy_(~kept) if gradient is not None else zero.logical_or_(~kept)
        mask.replace(result)

    def _moment(self, mask: ParameterMask, optimizer: Any) -> Tensor | None:
        if self.options.scores != "fisher":
            return None
        moment = second_moment(optimizer, mask.parameter)
        if moment is None:
            raise ValueError(
                f"scores='fisher' needs the optimizer's mean of squared gradients, and it has none for {mask.name}: use Adam or "
                "AdamW in 32 bits, or scores='magnitude'"
            )
        return moment

    def _regrowth(self, mask: ParameterMask) -> Tensor | None:
        """Returns the absolute gradients of pruned weights, shared between processes; None where nothing regrows."""
        if mask.collected is None:
            return None
        sum_over_processes(mask.collected)
        gradients = mask.collected.abs()
        mask.collect(False)
        return gradients

    def _kept(
        self, weight: Weight, values: Tensor, pruned: Tensor, steep: Tensor | None, gradient: Tensor | None, step: int
    ) -> Tensor:
        """Returns the mask `[out, in]` (True = kept) of a layer after this step; pruned weights score lowest of all."""
        sparsity, pattern = self._wanted(weight, step)
        if sparsity <= 0:
            return torch.ones_like(pruned)
        stats = self.norms.stats(weight) if self.norms is not None else None
        layer = Layer(weight.name, values, stats=stats, sparsity=sparsity, pattern=pattern)
        scores = self.pruner.scores(layer).to(torch.float32) if steep is None else values.float().square() * steep
        scores = scores.masked_fill(pruned, -torch.inf)
        if gradient is not None:
            scores = regrown(scores, gradient, pruned, self.pruner.mask(self._sparser(layer, step), scores))
        return self.pruner.mask(layer, scores)

    def _wanted(self, weight: Weight, step: int) -> tuple[float, Pattern]:
        """Returns a layer's sparsity after this step, and its pattern: 7:8, 6:8, ... on the way to 4:8."""
        planned = self.plan.layers[weight.name]
        sparsity = self.schedule.at(step, self.first.get(weight.name, 0.0), planned.sparsity)
        pattern = Pattern.parse(planned.pattern)
        if pattern.group is not None and step < self.schedule.end:
            pattern = Pattern(None, pattern.group).at(sparsity)
            sparsity = pattern.sparsity or 0.0
        return sparsity, pattern

    def _swapped(self, step: int) -> float:
        """Returns the share of kept weights that may be swapped after this step: none at the end."""
        if step >= self.schedule.end:
            return 0.0
        return self.options.regrow * 0.5 * (1 + math.cos(math.pi * self.schedule.over(step)))

    def _sparser(self, layer: Layer, step: int) -> Layer:
        """Returns the layer as it would be if the weights that may be swapped were pruned, at least one of a group kept."""
        share, pattern = self._swapped(step), layer.pattern
        if pattern.kept is not None and pattern.group is not None:
            kept = max(1, pattern.kept - math.ceil(share * pattern.kept)) if pattern.kept > 1 else 1
            pattern = Pattern(kept, pattern.group)
            return replace(layer, pattern=pattern, sparsity=pattern.sparsity or 0.0)
        return replace(layer, sparsity=layer.sparsity + share * (1 - layer.sparsity))

    # ---- how many of each layer

    def _turns(self, total: int) -> set[int]:
        """Returns the updates at which budgets are decided anew: the first at or after each step that was asked for."""
        again, schedule = self.options.reallocate, self.schedule
        if again is None:
            return set()
        if any(layer.pattern != "unstructured" for layer in self.plan.layers.values()):
            raise ValueError(
                "budgets are decided anew for unstructured plans only; use reallocate=None with N:M patterns"
            )
        if self.masks.is_sharded:
            raise ValueError("budgets are decided anew on whole weights only; with FSDP use reallocate=None")
        turns = set()
        for value in again.at:
            step = steps_of(value, total)
            due = next(
                (s for s in range(max(step, schedule.start), schedule.end) if schedule.is_due(s) and s > 0), None
            )
            if due is None:
                raise ValueError(
                    f"at={value!r} is step {step}, and no update before the schedule's end at {schedule.end} comes after it"
                )
            turns.add(due)
        return turns

    def reallocate(self, step: int, model: PreTrainedModel) -> None:
        """Decides the budgets anew on the model as it is; from here the layers go to these, along the same curve."""
        again = self.options.reallocate
        assert again is not None
        config = SparsityConfig.from_dict({**plan_config(self.plan).to_dict(), "allocator": again.allocator})
        with torch.enable_grad():
            plan = make_plan(model, config, again.batches)
        shares = sparsities(self.masks)
        now = {name: shares.get(name, 0.0) for name in plan.layers}
        sizes = {name: layer.size for name, layer in plan.layers.items()}
        wanted = {name: layer.sparsity for name, layer in plan.layers.items()}
        last = wanted if self.options.regrow else raised(wanted, now, sizes, plan.target)
        layers = {name: replace(layer, sparsity=last[name]) for name, layer in plan.layers.items()}
        self.plan = replace(plan, layers=layers)
        left = self.schedule.left(step)
        self.first = {name: last[name] + (now[name] - last[name]) / left for name in layers}


def regrown(scores: Tensor, gradient: Tensor, pruned: Tensor, safe: Tensor) -> Tensor:
    """Returns the scores of a layer, float32 `[out, in]`, by which some of its pruned weights come back.

    In this order: the `safe` weights, the pruned ones by the size of their gradient, the others by their own scores; last the
    pruned ones without gradient.
    """
    others = scores.clamp_min(0).log()  # -inf for 0; below every gradient once the largest is 0
    others = others - others.amax().clamp_min(torch.finfo(torch.float32).min) - 1
    wanted = torch.where(gradient > 0, gradient.to(torch.float32), -torch.inf)
    return torch.where(pruned, wanted, others).masked_fill(safe, torch.inf)


def raised(
    wanted: Mapping[str, float], least: Mapping[str, float], sizes: Mapping[str, int], target: float
) -> dict[str, float]:
    """Returns sparsities shifted together, none below its least, until their mean weighted by size is the target.

    Where the least values alone exceed the target, they are returned.
    """
    total = sum(sizes.values())

    def shifted(by: float) -> dict[str, float]:
        return {name: max(least[name], min(value + by, max(HIGHEST, target))) for name, value in wanted.items()}

    def mean(by: float) -> float:
        return math.fsum(value * sizes[name] for name, value in shifted(by).items()) / total

    below, above = -2.0, 2.0
    if mean(0.0) <= target <= mean(0.0) + 1e-12:
        return shifted(0.0)
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if mean(middle) < target else (below, middle)
    return shifted(above)
