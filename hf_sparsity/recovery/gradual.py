"""Gradual pruning: zeros introduced while a model trains, a few more at a time, until the plan is met.

Zhu & Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, equation 1 (the cubic schedule); masks only
grow, so what is dead stays dead. The last update uses the pruner's own rule at the plan's own sparsity: a layer ends
with as many zeros as `prune` would give it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import NORMS, Layer, Pattern, Pruner
from ..core.stats import InputStats
from ..distributed import sum_over_processes
from ..model.inference import prepared
from ..model.layers import Weight
from ..plan import Plan
from ..planning.checks import plan_config
from ..streaming.fallback import FEWEST_TOKENS
from ..streaming.observer import InputObserver, Operands
from .zero_masks import ZeroMasks

SCHEDULES = {
    # share of the way, in [0, 1] -> share of the sparsity still to come
    "cubic": lambda way: (1 - way) ** 3,
    "linear": lambda way: 1 - way,
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
        """Whether masks change after this step."""
        return self.start <= step <= self.end and (step == self.end or (step - self.start) % self.interval == 0)

    def at(self, step: int, first: float, last: float) -> float:
        """The sparsity after this step of a layer that goes from `first` to `last`."""
        way = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return last + (first - last) * SCHEDULES[self.kind](way) if way < 1 else last


def gradual_pruner(plan: Plan) -> Pruner:
    """Returns the plan's pruner if it can score weights that are being trained.

    Raises:
        ValueError: a row allocator; a pruner that changes the weights that stay, needs more than the norms of the
            inputs, or does not compare scores within rows, layers or groups.
    """
    config = plan_config(plan)
    pruner = config.pruner
    if config.row_allocator is not None:
        raise ValueError("gradual pruning has no row allocator: use row_allocator=None")
    layer = Layer("any", torch.empty(1, 1))
    if pruner.updates_survivors or pruner.needs - {NORMS} or pruner.compared_within(layer) is None:
        raise ValueError(
            f"gradual pruning scores weights by a pruner such as 'magnitude' or 'wanda' (variant=False), not {pruner.name!r}: "
            "it compares weights by their inputs' norms at most, and training alone changes those that stay"
        )
    return pruner


class GradualPruning:
    """Grows `held` along a schedule.

    Args:
        first: sparsity of each layer at the start of the run; what is not named began dense.
    """

    def __init__(self, plan: Plan, held: ZeroMasks, schedule: Schedule, first: Mapping[str, float]):
        self.plan, self.held, self.schedule, self.first = plan, held, schedule, first
        self.pruner = gradual_pruner(plan)
        self.norms: RunningNorms | None = None
        if NORMS in self.pruner.needs:
            if held.is_sharded:
                raise ValueError("gradual pruning by wanda needs whole weights; with FSDP use pruner='magnitude'")
            self.norms = RunningNorms([w for h in held.parameters.values() for w in h.weights])

    @torch.no_grad()
    def update(self, step: int, model: PreTrainedModel, batch: Mapping[str, Any] | None) -> None:
        """Kills what the schedule wants dead after this step; `batch`: this process's last inputs of the model."""
        if self.norms is not None:
            assert batch is not None, "no forward pass was seen before masks were due"
            self.norms.observe(model, batch)
        for held in self.held.parameters.values():
            values, dead = held.whole()
            dead = dead.clone()
            for (weight, part), (_, gone) in zip(held.views(values), held.views(dead), strict=True):
                gone |= ~self._mask(weight, part, gone, step)
            held.put(dead)

    def _mask(self, weight: Weight, values: Tensor, dead: Tensor, step: int) -> Tensor:
        """Mask `[out, in]` (True = kept) of a layer after this step; dead weights score lowest of all."""
        planned = self.plan.layers[weight.name]
        sparsity = self.schedule.at(step, self.first.get(weight.name, 0.0), planned.sparsity)
        pattern = Pattern.parse(planned.pattern)
        if pattern.group is not None and step < self.schedule.end:
            pattern = Pattern(None, pattern.group).at(sparsity)  # 7:8, 6:8, ... on the way to 4:8
            sparsity = pattern.sparsity or 0.0
        stats = self.norms.stats(weight) if self.norms is not None else None
        layer = Layer(weight.name, values, stats=stats, sparsity=sparsity, pattern=pattern)
        if sparsity <= 0:
            return torch.ones_like(dead)
        scores = self.pruner.scores(layer).to(torch.float32).masked_fill(dead, -torch.inf)
        return self.pruner.mask(layer, scores)


class RunningNorms:
    """Mean square of each layer's input columns, an average over the batches of past updates that slowly forgets.

    One forward of the last training batch per update, experts one by one, so that every product is seen whatever
    kernels training itself uses. Norms are shared between processes, so that all come to the same masks.
    """

    def __init__(self, weights: list[Weight]):
        self.weights = weights
        self.mean_sq: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        """Adds one batch of the model's keyword arguments; padding is left out where it can be told."""
        real = batch.get("attention_mask")
        real = real.bool() if isinstance(real, Tensor) and real.ndim == 2 and not real.all() else None
        sums = {w.name: torch.zeros(w.shape[1] + 1, device=w.read().device) for w in self.weights}

        def add(weight: Weight, inputs: Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            if real is not None and rows.shape[0] == real.numel():
                rows = rows[real.reshape(-1).to(rows.device)]
            sums[weight.name][:-1] += rows.square().sum(dim=0)
            sums[weight.name][-1] += rows.shape[0]

        inputs = {k: v for k, v in batch.items() if k not in ("labels", "num_items_in_batch", "use_cache")}
        with prepared(model), InputObserver(Operands(self.weights), add):
            model(**inputs, use_cache=False)
        for name, total in sums.items():
            sum_over_processes(total)
            if total[-1] >= FEWEST_TOKENS:
                mean = total[:-1] / total[-1]
                before = self.mean_sq.get(name, mean)
                self.mean_sq[name] = MEMORY * before + (1 - MEMORY) * mean

    def stats(self, weight: Weight) -> InputStats:
        """A layer's norms for a pruner; all equal, which means magnitude, for an expert that saw too few tokens."""
        needs = frozenset({NORMS})
        if weight.name not in self.mean_sq:
            return InputStats.flat(needs, weight.shape[1], 1.0, weight.read().device)
        stats = InputStats(needs)
        stats.mean_sq = self.mean_sq[weight.name]
        return stats
