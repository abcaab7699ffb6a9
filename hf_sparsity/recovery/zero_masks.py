"""Zeros that training must not touch: which they are, and what keeps them.

A mask is stored per parameter, not read from the weights again, so that a survivor that happens to become 0 stays a
survivor. It is kept as its complement `dead` (True = zero), which is what `zero_` wants at every step, one byte
per weight. Everything works on the local shard of a parameter, so holding zeros never communicates.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.masks import zero_
from ..core.shards import local
from ..model.layers import Weight


@dataclass
class ParameterMask:
    """One parameter with zeros to hold: `dead` is bool of the local shard's shape, True = zero."""

    name: str
    parameter: nn.Parameter
    weights: list[Weight] = field(repr=False)
    dead: Tensor = field(repr=False)
    zeros: int = 0  # over all shards

    @property
    def size(self) -> int:
        """Number of planned weights in the parameter, over all shards."""
        return sum(weight.size for weight in self.weights)

    def views(self, tensor: Tensor) -> Iterable[tuple[Weight, Tensor]]:
        """Each planned weight and its part `[out, in]` of a whole tensor of the parameter's shape."""
        for weight in self.weights:
            part = tensor if weight.expert is None else tensor[weight.expert]
            yield weight, part.T if weight.transposed else part

    def whole(self) -> tuple[Tensor, Tensor]:
        """(the parameter, its `dead`) gathered from all shards; every process must call it."""
        if not isinstance(self.parameter, DTensor):
            return self.parameter.detach(), self.dead
        dead = self._as_shards(self.dead).full_tensor()
        return self.parameter.full_tensor().detach(), dead

    def put(self, dead: Tensor) -> None:
        """Replaces `dead`, given whole; every process must call it."""
        if isinstance(self.parameter, DTensor):
            sharded = distribute_tensor(dead, self.parameter.device_mesh, self.parameter.placements)
            self.dead, self.zeros = sharded.to_local(), int(dead.sum())
        else:
            self.dead, self.zeros = dead, int(dead.sum())

    def count(self) -> None:
        """Brings `zeros` up to date; every process must call it."""
        total = (
            self._as_shards(self.dead).sum().full_tensor() if isinstance(self.parameter, DTensor) else self.dead.sum()
        )
        self.zeros = int(total)

    def _as_shards(self, part: Tensor) -> Any:
        like = self.parameter
        assert isinstance(like, DTensor)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


class ZeroMasks:
    """The zeros of all planned weights of a model, and the three places where training could lose them.

    Args:
        weights: the planned weights by name; each of their values that is 0 now is held.

    Raises:
        ValueError: only some experts of a sharded parameter are planned.
    """

    def __init__(self, weights: Mapping[str, Weight]):
        grouped: dict[str, list[Weight]] = {}
        for weight in weights.values():
            grouped.setdefault(weight.parameter, []).append(weight)
        self.parameters = {name: _held(name, group) for name, group in grouped.items()}
        self._handles: list[Any] = []

    @property
    def sparsity(self) -> float:
        """Held zeros over planned weights, without reading a weight."""
        return sum(h.zeros for h in self.parameters.values()) / sum(h.size for h in self.parameters.values())

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of the weights."""
        return any(isinstance(held.parameter, DTensor) for held in self.parameters.values())

    @torch.no_grad()
    def apply(self) -> None:
        """Makes every dead weight exactly 0."""
        for held in self.parameters.values():
            zero_(local(held.parameter), held.dead)

    def hold_gradients(self) -> None:
        """From now on gradients of dead weights are 0 as soon as they are accumulated.

        So before they are clipped, reduced over processes, or seen by an optimizer's moments.
        """
        self.release()
        for held in self.parameters.values():
            if held.parameter.requires_grad:
                # The hook asks `held` each time, because gradual pruning replaces `dead`.
                hook = held.parameter.register_post_accumulate_grad_hook(lambda _, held=held: _mask_gradient(held))
                self._handles.append(hook)

    def release(self) -> None:
        """Removes what `hold_gradients` put on the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def clean(self, optimizer: Any) -> None:
        """Zeroes the optimizer's state (moments, fp32 copies) at dead weights, after masks were made or changed."""
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        for held in self.parameters.values() if optimizer is not None else ():
            for value in (optimizer.state.get(held.parameter) or {}).values():
                if isinstance(value, Tensor) and local(value).shape == held.dead.shape and value.is_floating_point():
                    zero_(local(value), held.dead)

    # ---- across a checkpoint

    def to_dict(self) -> dict[str, Any]:
        """What tells, with the weights of the same moment, exactly which are dead; plain JSON types.

        That is the number of dead weights of each parameter, and the positions of survivors that are 0 (few, so they
        are listed); None for these when only a part of the weights is here.
        """
        zeros = {name: held.zeros for name, held in self.parameters.items()}
        survivors = None
        if not self.is_sharded:
            found = {n: (h.parameter.detach() == 0) & ~h.dead for n, h in self.parameters.items()}
            survivors = {n: _pack(flags) for n, flags in found.items() if flags.any()}
        return {"zeros": zeros, "survivors": survivors}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Makes the masks those of `to_dict`, after the weights of that moment were loaded.

        Raises:
            ValueError: the weights do not have the zeros that were saved with them.
        """
        if set(saved["zeros"]) != set(self.parameters):
            raise ValueError("the checkpoint's masks are for other layers than this model's plan has")
        for name, held in self.parameters.items():
            if text := (saved["survivors"] or {}).get(name):
                held.dead.view(-1)[_unpack(text).to(held.dead.device)] = False
                held.count()
            if held.zeros != saved["zeros"][name]:
                raise ValueError(
                    f"{name} has {held.zeros} zeros, but {saved['zeros'][name]} were held when the checkpoint was written: "
                    "these are not its weights. Load the model from the checkpoint folder with from_pretrained, then "
                    "pass it to the Trainer and resume"
                )


def _held(name: str, weights: list[Weight]) -> ParameterMask:
    parameter = weights[0].stored
    dead = local(parameter.detach()) == 0
    planned = {weight.expert for weight in weights}
    if planned != {None} and len(planned) < parameter.shape[0]:
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded and only {len(planned)} of its experts are planned: plan all or none")
        for expert in set(range(parameter.shape[0])) - planned:
            dead[expert] = False
    held = ParameterMask(name, parameter, weights, dead)
    held.count()
    return held


def _mask_gradient(held: ParameterMask) -> None:
    if held.parameter.grad is not None:
        zero_(local(held.parameter.grad), held.dead)


def _pack(flags: Tensor) -> str:
    """Positions of True in a bool tensor as text: differences, compressed."""
    positions = flags.reshape(-1).nonzero().reshape(-1).cpu().numpy().astype("<i8")
    return base64.b64encode(zlib.compress(np.diff(positions, prepend=0).tobytes())).decode()


def _unpack(text: str) -> Tensor:
    """int64 positions from `_pack`'s text."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8")
    return torch.from_numpy(np.cumsum(steps))
