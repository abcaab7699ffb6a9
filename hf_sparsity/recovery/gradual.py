"""Gradual pruning: zeros introduced while a model trains, a few more at a time, until the plan is met.

Zhu & Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, equation 1 (the cubic schedule); masks only
grow, so a pruned weight stays pruned. The last update uses the pruner's own rule at the plan's own sparsity: a layer
ends with as many zeros as `prune` would give it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import NORMS, Layer, Pattern, Pruner
from ..core.stats import InputStats
from ..distributed import sum_over_processes
from ..model.inference import prepared
from ..model.layers import Weight
from ..plan import LayerPlan, Plan
from ..planning.checks import plan_config
from ..pruners.magnitude import Magnitude
from ..pruners.wanda import Wanda
from ..streaming.fallback import FEWEST_TOKENS
from ..streaming.observer import InputObserver
from ..streaming.operands import Operands
from .checks import sparsities
from .zero_masks import ZeroMasks

SCHEDULES = {
    # share of the schedule that is over, in [0, 1] -> share of the sparsity still to come
    "cubic": lambda over: (1 - over) ** 3,
    "linear": lambda over: 1 - over,
}
MEMORY = 0.9  # share of the earlier batches in the running input norms at each update


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

    def at(self, step: int, first: float, last: float) -> float:
        """Returns the sparsity, after this step, of a layer that goes from `first` to `last`."""
        over = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return last + (first - last) * SCHEDULES[self.kind](over) if over < 1 else last


def gradual_pruner(plan: Plan) -> Pruner:
    """Returns the plan's pruner if it can score weights that are being trained; raises ValueError otherwise."""
    config = plan_config(plan)
    pruner = config.pruner
    if config.row_allocator is not None:
        raise ValueError("gradual pruning has no row allocator: use row_allocator=None")
    if isinstance(pruner, Magnitude) or (isinstance(pruner, Wanda) and not pruner.variant):
        return pruner
    raise ValueError(
        f"gradual pruning scores weights by pruner 'magnitude' or 'wanda' (variant=False), not {getattr(pruner, 'name', pruner)!r}: "
        "other pruners change survivors too, which training does here"
    )


class GradualPruning:
    """Grows masks along a schedule.

    Args:
        plan: what to prune to.
        masks: the model's masks, replaced by larger ones at each update.
        schedule: when, and how far.
        first: sparsity of each layer at the start of the run; what is not named began dense.
    """

    def __init__(self, plan: Plan, masks: ZeroMasks, schedule: Schedule, first: Mapping[str, float]):
        self.plan, self.masks, self.schedule, self.first = plan, masks, schedule, first
        self.pruner = gradual_pruner(plan)
        self.norms: RunningNorms | None = None
        if NORMS in self.pruner.needs:
            if masks.is_sharded:
                raise ValueError("gradual pruning by wanda needs whole weights; with FSDP use pruner='magnitude'")
            self.norms = RunningNorms([w for mask in masks.parameters.values() for w in mask.weights])

    @torch.no_grad()
    def update(self, step: int, model: PreTrainedModel) -> None:
        """Prunes what the schedule wants pruned after this step."""
        if self.norms is not None:
            self.norms.observe(model)
        for mask in self.masks.parameters.values():
            values, pruned = mask.whole()
            pruned = pruned.clone()
            for (weight, part), (_, zero) in zip(mask.views(values), mask.views(pruned), strict=True):
                zero |= ~self._kept(weight, part, zero, step)
            mask.replace(pruned)

    def reached(self, step: int) -> Plan:
        """Returns the plan at the end of the schedule; before, one that says what each layer has reached."""
        if step >= self.schedule.end:
            return self.plan
        shares = sparsities(self.masks)
        layers = {n: LayerPlan(shares.get(n, 0.0), layer.size) for n, layer in self.plan.layers.items()}
        config = {**self.plan.config, "pattern": "unstructured"}
        plan = replace(self.plan, config=config, layers=layers, chosen=None, story=None)
        return replace(plan, config={**config, "sparsity": plan.sparsity})

    def _kept(self, weight: Weight, values: Tensor, pruned: Tensor, step: int) -> Tensor:
        """Returns the mask `[out, in]` (True = kept) of a layer after this step; pruned weights score lowest of all."""
        planned = self.plan.layers[weight.name]
        sparsity = self.schedule.at(step, self.first.get(weight.name, 0.0), planned.sparsity)
        pattern = Pattern.parse(planned.pattern)
        if pattern.group is not None and step < self.schedule.end:
            pattern = Pattern(None, pattern.group).at(sparsity)  # 7:8, 6:8, ... on the way to 4:8
            sparsity = pattern.sparsity or 0.0
        stats = self.norms.stats(weight) if self.norms is not None else None
        layer = Layer(weight.name, values, stats=stats, sparsity=sparsity, pattern=pattern)
        if sparsity <= 0:
            return torch.ones_like(pruned)
        scores = self.pruner.scores(layer).to(torch.float32).masked_fill(pruned, -torch.inf)
        return self.pruner.mask(layer, scores)


class RunningNorms:
    """Mean square of each layer's input columns, an average over the batches of past updates that slowly forgets.

    At each update the last training batch goes forward once more, experts one by one, so that every product is seen
    whatever kernels training itself uses. What is repeated is the forward of the model without its head, with the
    inputs it got: trainers put losses of their own into the whole model's forward. Norms are shared between processes,
    so that all come to the same masks.
    """

    def __init__(self, weights: list[Weight]):
        self.weights = weights
        self.mean_sq: dict[str, Tensor] = {}
        self._inputs: dict[str, Any] | None = None
        self._autocast: Any = nullcontext()

    def watch(self, model: PreTrainedModel) -> Any:
        """Remembers the inputs of each training forward from now on; returns the handle of the hook that does."""
        return self._body(model).register_forward_pre_hook(self._remember, with_kwargs=True)

    def forget(self) -> None:
        """Lets the last batch go."""
        self._inputs = None

    def _body(self, model: PreTrainedModel) -> Any:
        """Returns the model without its head, if that has all the layers."""
        body = model.base_model
        inside = set(map(id, body.modules()))
        return body if all(id(weight.module) in inside for weight in self.weights) else model

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # storing the inputs is no part of the model
    def _remember(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not module.training:
            return
        names = inspect.signature(type(module).forward).parameters
        inputs = dict(zip(list(names)[1:], args, strict=False)) | dict(kwargs)
        self._inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        kind = next(module.parameters()).device.type
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    @torch.no_grad()
    def observe(self, model: PreTrainedModel) -> None:
        """Adds the last training batch; padding is left out where it can be told.

        Raises:
            ValueError: no training forward was seen.
        """
        body, batch = self._body(model), self._inputs
        if batch is None:
            raise ValueError(
                f"no training forward of {type(body).__name__} was seen before masks were due: the trainer calls parts of "
                "the model itself. Use pruner='magnitude', which needs no inputs"
            )
        padding = batch.get("attention_mask")
        real = padding.bool() if isinstance(padding, Tensor) and padding.ndim == 2 and not padding.all() else None
        sums = {w.name: torch.zeros(w.shape[1] + 1, device=w.read().device) for w in self.weights}

        def add(weight: Weight, inputs: Tensor, _in_order: bool) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            if real is not None and rows.shape[0] == real.numel():
                rows = rows[real.reshape(-1).to(rows.device)]
            sums[weight.name][:-1] += rows.square().sum(dim=0)
            sums[weight.name][-1] += rows.shape[0]

        with prepared(model), self._autocast, InputObserver(Operands(self.weights), add):
            _forward(body, batch)
        for name, total in sums.items():
            sum_over_processes(total)
            if total[-1] >= FEWEST_TOKENS:
                mean = total[:-1] / total[-1]
                before = self.mean_sq.get(name, mean)
                self.mean_sq[name] = MEMORY * before + (1 - MEMORY) * mean

    def stats(self, weight: Weight) -> InputStats:
        """Returns a layer's norms for a pruner; all equal, which means magnitude, for an expert with too few tokens."""
        needs = frozenset({NORMS})
        if weight.name not in self.mean_sq:
            return InputStats.flat(needs, weight.shape[1], 1.0, weight.read().device)
        stats = InputStats(needs)
        stats.mean_sq = self.mean_sq[weight.name]
        return stats


def _forward(body: Any, batch: Mapping[str, Any]) -> None:
    """Runs the class's own forward, since trainers replace the instance's; without a loss and without a cache."""
    dropped = {"num_items_in_batch", "use_cache", "past_key_values"}
    if not body.config.is_encoder_decoder:  # which makes the decoder's inputs of labels
        dropped.add("labels")
    parameters = inspect.signature(type(body).forward).parameters.values()
    takes_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    inputs = {name: value for name, value in batch.items() if name not in dropped}
    type(body).forward(body, **inputs, **({"use_cache": False} if takes_cache else {}))
