"""A block that computes as if it were pruned, its weights unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from .layers import Block


@contextmanager
def masked(block: Block, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets masked copies of these layers' parameters stand in for them; the block must be on its device.

    `masks`: layer name -> bool `[out, in]`, True = kept; layers without one stay dense.
    """
    own: dict[tuple[int, str], tuple[nn.Module, nn.Parameter]] = {}
    try:
        for name, mask in masks.items():
            weight = block.weights[name]
            key = (id(weight.module), weight.attribute)
            if key not in own:
                own[key] = (weight.module, weight.used)
                copy = nn.Parameter(weight.used.detach().clone(), requires_grad=False)
                weight.module._parameters[weight.attribute] = copy
            weight.read().mul_(mask.to(weight.read().device))
        yield
    finally:
        for (_, attribute), (module, parameter) in own.items():
            module._parameters[attribute] = parameter
