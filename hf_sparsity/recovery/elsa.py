"""ELSA: ADMM with the training loss itself, so that a model is trained towards a sparse one of a plan's budgets.

Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM", ICLR 2026,
https://arxiv.org/abs/2510.01650; checked against the authors' optimizer (LOG-postech/elsa, `lib/optimizers.py`). For the
weights w of each parameter there is a sparse copy z and a scaled dual u:

* w: the optimizer's step, of whatever kind, with `λ (w - z + u)` added to the gradient after it was clipped;
* every `interval` steps `z = Π(w + u)`, then `u = u + w - z`; Π keeps the largest `F·(w + u)²` of a layer, F being the
  optimizer's second moment;
* λ rises along a cosine, and u, which is the dual divided by λ, is rescaled with it;
* at the end `w = Π(w)`.

Differences: a layer's sparsity is that of the plan, where the authors use one for all; u is rescaled when λ changes, not one
projection later; in several processes each adds the whole term to the averaged gradient, of which the authors' code adds the
share of one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Pattern
from ..checkpoint.atomic import write_tensors
from ..core import masks as mask_rules
from ..plan import LayerPlan, Plan
from .gradual import Schedule
from .schedules import Elsa
from .second_moment import second_moment
from .zero_masks import ParameterMask, ZeroMasks

STATE_FILE = "elsa.safetensors"  # in a checkpoint's folder: z and u of every parameter


class ElsaPruning:
    """The sparse copies and duals of a model's planned weights, and what they do to its training.

    Args:
        plan: the sparsity and pattern of each layer.
        masks: the model's masks, which get the zeros at the end.
        schedule: `interval` and `end` in optimizer steps.
        options: the penalty and the rest.

    Raises:
        ValueError: sharded weights.
    """

    norms = None  # as gradual pruning has them

    def __init__(self, plan: Plan, masks: ZeroMasks, schedule: Schedule, options: Elsa):
        if masks.is_sharded:
            raise ValueError("ELSA projects whole weights, which FSDP and DeepSpeed split; use DDP")
        self.plan, self.masks, self.schedule, self.options = plan, masks, schedule, options
        self.first: dict[str, float] = {}
        self.rate = self.penalty(0)
        self.sparse: dict[str, Stored] = {}  # z
        self.dual: dict[str, Stored] = {}  # u

    def penalty(self, step: int) -> float:
        """Returns λ after this step."""
        if self.options.curve == "constant":
            return self.options.penalty
        over = min(step / self.schedule.end, 1.0)
        return self.options.penalty * 0.5 * (1 - math.cos(math.pi * over))

    def is_due(self, step: int) -> bool:
        """Returns whether there is a projection after this step."""
        return 0 < step <= self.schedule.end and (step % self.schedule.interval == 0 or step == self.schedule.end)

    def before(self, step: int) -> None:
        """Does nothing: gradients of pruned weights are not needed."""

    @torch.no_grad()
    def begin(self, optimizer: Any = None) -> None:
        """Makes the first sparse copies, of the weights alone, and duals of 0."""
        for name, mask in self.masks.parameters.items():
            values = mask.parameter.detach().float()
            self.sparse[name] = Stored(self._projected(mask, values, None), self.options.dtype)
            self.dual[name] = Stored(torch.zeros_like(values), self.options.dtype)

    @torch.no_grad()
    def penalise(self) -> None:
        """Adds `λ (w - z + u)` to the gradients, which were averaged over processes and clipped before."""
        if not self.rate or not self.sparse:
            return
        for name, mask in self.masks.parameters.items():
            parameter = mask.parameter
            if not parameter.requires_grad:
                continue
            term = (parameter.detach().float() - self.sparse[name].read() + self.dual[name].read()).mul_(self.rate)
            if parameter.grad is None:
                parameter.grad = term.to(parameter.dtype)
            else:
                parameter.grad += term.to(parameter.grad.dtype)

    @torch.no_grad()
    def update(self, step: int, model: PreTrainedModel, optimizer: Any = None) -> None:
        """Projects: the copies and duals on the way; at the end the weights themselves, whose zeros are masked from then on."""
        last = step == self.schedule.end
        rate = self.penalty(step)
        for name, mask in self.masks.parameters.items():
            moment = self._moment(mask, optimizer)
            values = mask.parameter.detach().float()
            if last:
                mask.replace(mask.pruned | (self._projected(mask, values, moment) == 0))
                continue
            dual = self.dual[name].read()
            shifted = values + dual
            copy = self._projected(mask, shifted, moment)
            shifted -= copy
            self.sparse[name] = Stored(copy, self.options.dtype)
            self.dual[name] = Stored(shifted * (self.rate / rate if rate else 0.0), self.options.dtype)
        self.rate = rate
        if last:
            self.sparse, self.dual = {}, {}

    def reached(self, step: int) -> Plan:
        """Returns the plan; it is met at the end, and before that the model is dense."""
        return self.plan

    def residual(self) -> float:
        """Returns how far the weights are from their sparse copies, `‖w - z‖ / ‖w‖`; 0 once they are projected."""
        if not self.sparse:
            return 0.0
        away = size = torch.zeros(())
        for name, mask in self.masks.parameters.items():
            values = mask.parameter.detach().float()
            away = away + (values - self.sparse[name].read()).square().sum().cpu()
            size = size + values.square().sum().cpu()
        return float((away / size).sqrt())

    # ---- across a checkpoint

    def save(self, folder: Path) -> None:
        """Writes z, u and λ into a checkpoint's folder, once it is there and as long as they are needed."""
        if self.sparse and folder.is_dir():
            tensors: dict[str, Tensor] = {}
            for kind, values in (("z", self.sparse), ("u", self.dual)):
                for name, stored in values.items():
                    tensors |= {f"{kind}.{name}": stored.values, f"{kind}.{name}.scale": stored.scale}
            write_tensors(folder / STATE_FILE, tensors, {"rate": repr(self.rate), "dtype": self.options.dtype})

    def load(self, folder: Path | None, step: int) -> None:
        """Reads what `save` wrote at this step.

        Raises:
            ValueError: the file is missing, damaged, or of other layers.
        """
        path = None if folder is None else folder / STATE_FILE
        if path is None or not path.exists():
            raise ValueError(
                f"the checkpoint of step {step} has no {STATE_FILE}, which holds ELSA's copies and duals; resume a checkpoint that "
                "was written with the callback, by the path of its folder"
            )
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error}); resume an earlier checkpoint") from None
        for name, mask in self.masks.parameters.items():
            for kind, target in (("z", self.sparse), ("u", self.dual)):
                values, scale = found.get(f"{kind}.{name}"), found.get(f"{kind}.{name}.scale")
                if values is None or scale is None or values.shape != mask.parameter.shape:
                    raise ValueError(f"{path} holds the copies of another model: {kind}.{name} does not fit")
                device = mask.parameter.device
                target[name] = Stored.again(values.to(device), scale.to(device))
        self.rate = self._rate_at(step)

    def _rate_at(self, step: int) -> float:
        """Returns the λ that holds after a step: that of the last projection."""
        return self.penalty(step - step % self.schedule.interval)

    # ---- the projection

    def _moment(self, mask: ParameterMask, optimizer: Any) -> Tensor | None:
        if self.options.importance == "magnitude":
            return None
        moment = second_moment(optimizer, mask.parameter)
        if moment is None and self.options.importance == "fisher":
            raise ValueError(
                f"importance='fisher' needs the optimizer's mean of squared gradients, and it has none for {mask.name}: use Adam "
                "or AdamW in 32 bits, or importance='magnitude'"
            )
        return moment

    def _projected(self, mask: ParameterMask, values: Tensor, moment: Tensor | None) -> Tensor:
        """Returns Π: a parameter's float32 values, 0 where its layers' budgets leave no room."""
        result = values.clone()
        moments: Iterable[tuple[Any, Any]] = (
            mask.views(moment) if moment is not None else ((w, None) for w in mask.weights)
        )
        for (weight, part), (_, steep) in zip(mask.views(result), moments, strict=True):
            scores = part.square() if steep is None else part.square() * steep
            part.masked_fill_(~keep(scores, self.plan.layers[weight.name]), 0)
        return result


def keep(scores: Tensor, planned: LayerPlan) -> Tensor:
    """Returns the mask `[out, in]` (True = kept) of a layer's largest scores, by its planned sparsity and pattern."""
    pattern = Pattern.parse(planned.pattern)
    if pattern.kept is not None and pattern.group is not None:
        return mask_rules.keep_groups(scores, pattern.kept, pattern.group)
    return mask_rules.keep_layer(scores, planned.sparsity)


class Stored:
    """A tensor kept in few bits: float32 or bfloat16 as it is, float8 divided by one scale that makes its largest value fit."""

    def __init__(self, values: Tensor, dtype: str):
        kind: torch.dtype = getattr(torch, dtype)
        self.scale = torch.ones((), device=values.device)
        if kind == torch.float8_e4m3fn:
            largest = values.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            self.scale = largest / torch.finfo(kind).max
        self.values = (values / self.scale).to(kind) if kind == torch.float8_e4m3fn else values.to(kind)

    @classmethod
    def again(cls, values: Tensor, scale: Tensor) -> Stored:
        """Returns what was read from a file."""
        stored = cls.__new__(cls)
        stored.values, stored.scale = values, scale
        return stored

    def read(self) -> Tensor:
        """Returns the values in float32."""
        return self.values.float() * self.scale
