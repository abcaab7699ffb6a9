"""Which weights are held at zero during training, and what holds them.

A mask is stored per parameter, not read from the weights again, so that a survivor that happens to become 0 goes on
training. It is kept as its complement `pruned` (True = held at zero), which is what `zero_` needs at every step: one
byte per weight. Everything works on this process's shard of a parameter, so holding zeros never communicates.
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
from .deepspeed import master_parts, optimizer_of, uses_deepspeed


@dataclass
class ParameterMask:
    """One parameter with zeros to hold: `pruned` is bool of the local shard's shape, True = held at zero."""

    name: str
    parameter: nn.Parameter
    weights: list[Weight] = field(repr=False)
    pruned: Tensor = field(repr=False)
    zeros: int = 0  # held zeros over all shards
    collected: Tensor | None = field(default=None, repr=False)  # gradients of pruned weights, while they are asked for

    @classmethod
    def of(cls, name: str, weights: list[Weight]) -> ParameterMask:
        """Returns the mask of the zeros that a parameter has now."""
        mask = cls(name, weights[0].stored, weights, torch.empty(0))
        mask.read()
        return mask

    def read(self) -> None:
        """Makes the held zeros those that the planned weights have now; every process must call it."""
        pruned = local(self.parameter.detach()) == 0
        planned = {weight.expert for weight in self.weights}
        if planned != {None} and len(planned) < self.parameter.shape[0]:
            if isinstance(self.parameter, DTensor):
                raise ValueError(
                    f"{self.name} is sharded and only {len(planned)} of its experts are planned: plan all or none"
                )
            for expert in set(range(self.parameter.shape[0])) - planned:
                pruned[expert] = False
        self.pruned = pruned
        self.count()

    @property
    def size(self) -> int:
        """Number of planned weights in the parameter, over all shards."""
        return sum(weight.size for weight in self.weights)

    def views(self, tensor: Tensor) -> Iterable[tuple[Weight, Tensor]]:
        """Yields each planned weight and its part `[out, in]` of a whole tensor of the parameter's shape."""
        for weight in self.weights:
            part = tensor if weight.expert is None else tensor[weight.expert]
            yield weight, part.T if weight.transposed else part

    def whole(self) -> tuple[Tensor, Tensor]:
        """Returns (the parameter, `pruned`) gathered from all shards; every process must call it."""
        if not isinstance(self.parameter, DTensor):
            return self.parameter.detach(), self.pruned
        pruned = self._as_shards(self.pruned).full_tensor()
        return self.parameter.full_tensor().detach(), pruned

    def replace(self, pruned: Tensor) -> None:
        """Replaces `pruned` by a whole tensor; every process must call it."""
        self.zeros = int(pruned.sum())
        if isinstance(self.parameter, DTensor):
            pruned = distribute_tensor(pruned, self.parameter.device_mesh, self.parameter.placements).to_local()
        self.pruned = pruned

    def count(self) -> None:
        """Brings `zeros` up to date; every process must call it."""
        sharded = isinstance(self.parameter, DTensor)
        self.zeros = int(self._as_shards(self.pruned).sum().full_tensor() if sharded else self.pruned.sum())

    def apply(self) -> None:
        """Makes every pruned weight exactly 0, in the parameter and in DeepSpeed's float32 copy of it."""
        zero_(local(self.parameter), self._on(local(self.parameter)))
        for part, place in master_parts(self.parameter):
            zero_(part, self._on(part).reshape(-1)[place])

    def clean(self, optimizer: Any) -> None:
        """Zeroes the optimizer's state at pruned weights."""
        state = getattr(optimizer, "state", None)
        values = (state.get(self.parameter) or {}) if isinstance(state, Mapping) else {}
        for value in values.values() if isinstance(values, Mapping) else ():
            # Other libraries keep moments as tensor subclasses, in 8 bits: these are left alone, and their moments fade.
            plain = type(value) in (Tensor, nn.Parameter, DTensor) and value.is_floating_point()
            if plain and local(value).shape == self.pruned.shape:
                zero_(local(value), self._on(local(value)))

    def collect(self, wanted: bool) -> None:
        """Begins to sum the gradients that pruned weights would have had, or forgets them; only whole parameters can."""
        self.collected = torch.zeros_like(self.parameter, dtype=torch.float32) if wanted else None

    def mask_gradient(self, _: Any = None) -> None:
        """Zeroes the accumulated gradient at pruned weights."""
        if self.parameter.grad is not None:
            if self.collected is not None:  # they were 0 before this part of a batch, so what is there now is its own
                self.collected += self.parameter.grad.masked_fill(~self._on(self.parameter.grad), 0)
            zero_(local(self.parameter.grad), self.pruned)

    def masked(self, gradient: Tensor) -> Tensor:
        """Returns a gradient with zeros at pruned weights, before it is accumulated."""
        return gradient.masked_fill(self._on(gradient), 0)

    def _on(self, tensor: Tensor) -> Tensor:
        return self.pruned.to(tensor.device)

    def _as_shards(self, part: Tensor) -> Any:
        like = self.parameter
        assert isinstance(like, DTensor)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


class ZeroMasks:
    """The zeros of all planned weights of a model, and what keeps training from losing them.

    Args:
        weights: the planned weights by name; each of their values that is 0 now is held.

    Raises:
        ValueError: only some experts of a sharded parameter are planned.
    """

    def __init__(self, weights: Mapping[str, Weight]):
        grouped: dict[str, list[Weight]] = {}
        for weight in weights.values():
            grouped.setdefault(weight.parameter, []).append(weight)
        self.parameters = {name: ParameterMask.of(name, group) for name, group in grouped.items()}
        self._handles: list[Any] = []
        self._changed = False  # whether weights may have changed since the last evaluation forward

    @property
    def sparsity(self) -> float:
        """Held zeros over planned weights, without reading a weight."""
        masks = self.parameters.values()
        return sum(mask.zeros for mask in masks) / sum(mask.size for mask in masks)

    @property
    def is_sharded(self) -> bool:
        """True if this process has only a part of the weights."""
        return any(isinstance(mask.parameter, DTensor) for mask in self.parameters.values())

    @torch.no_grad()
    def apply(self) -> None:
        """Makes every pruned weight exactly 0."""
        for mask in self.parameters.values():
            mask.apply()

    def hold(self, model: nn.Module, optimizer: Any = None) -> None:
        """Keeps the zeros from now on, wherever else weights are changed, until `release`.

        * Gradients of pruned weights are 0 as soon as they are accumulated: before they are clipped, reduced over
          processes, or seen by an optimizer's moments. (DeepSpeed reduces them earlier, so there they are masked earlier.)
        * Pruned weights are made 0 whenever the model's `state_dict` is taken, and before the first forward in
          evaluation mode after any step.
        """
        self.release()
        early = uses_deepspeed(optimizer)
        for mask in self.parameters.values():
            if mask.parameter.requires_grad:
                hook = mask.parameter.register_hook if early else mask.parameter.register_post_accumulate_grad_hook
                self._handles.append(hook(mask.masked if early else mask.mask_gradient))
        self._handles.append(model.register_state_dict_pre_hook(lambda *_: self.apply()))
        self._handles.append(model.register_forward_pre_hook(self._before_forward))

    def weights_may_change(self) -> None:
        """Has the weights masked once more before the next forward in evaluation mode."""
        self._changed = True

    def release(self) -> None:
        """Removes everything that `hold` put on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def clean(self, optimizer: Any) -> None:
        """Zeroes the optimizer's state (moments, float32 copies) at pruned weights, after masks were made or changed."""
        for mask in self.parameters.values():
            mask.clean(optimizer_of(optimizer))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module.training:
            self._changed = True
        elif self._changed:
            self._changed = False
            self.apply()

    # ---- across a checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Returns, as plain JSON types, what identifies the masks together with the weights of the same moment.

        That is the number of pruned weights of each parameter, and the positions of survivors that are 0 (few, so they
        are listed); None for the latter when only a part of the weights is here.
        """
        zeros = {name: mask.zeros for name, mask in self.parameters.items()}
        survivors = None
        if not self.is_sharded:
            flags = {name: (mask.parameter.detach() == 0) & ~mask.pruned for name, mask in self.parameters.items()}
            survivors = {name: _pack(flag) for name, flag in flags.items() if flag.any()}
        return {"zeros": zeros, "survivors": survivors}

    def read(self) -> None:
        """Makes the held zeros those that the planned weights have now; every process must call it."""
        for mask in self.parameters.values():
            mask.read()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Makes the masks, read from weights that were loaded from a checkpoint, those of its `to_dict`.

        Raises:
            ValueError: the weights do not have the zeros that were saved with them.
        """
        if set(saved["zeros"]) != set(self.parameters):
            raise ValueError("the checkpoint's masks are for other layers than this model's plan has")
        for name, mask in self.parameters.items():
            if text := (saved["survivors"] or {}).get(name):
                mask.pruned.view(-1)[_unpack(text).to(mask.pruned.device)] = False
                mask.count()
            if mask.zeros != saved["zeros"][name]:
                raise ValueError(
                    f"{name} has {mask.zeros} zeros, but {saved['zeros'][name]} were held when the checkpoint was written: "
                    "these are not its weights. Load the model from the checkpoint folder with from_pretrained, then "
                    "pass it to the Trainer and resume"
                )


def _pack(flags: Tensor) -> str:
    """Returns the positions of True in a bool tensor as text: their differences, compressed."""
    positions = flags.reshape(-1).nonzero().reshape(-1).cpu().numpy().astype("<i8")
    return base64.b64encode(zlib.compress(np.diff(positions, prepend=0).tobytes())).decode()


def _unpack(text: str) -> Tensor:
    """Returns the int64 positions in a text of `_pack`."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8")
    return torch.from_numpy(np.cumsum(steps))
