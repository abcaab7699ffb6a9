"""Accelerators: which devices are some, how much of their memory is free, and values that wait on the host meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .offload import hook_devices


def is_accelerator(device: torch.device) -> bool:
    """Returns whether a device has memory of its own: not the CPU, nor the meta device, which has none."""
    return device.type not in ("cpu", "meta")


def accelerators(model: nn.Module) -> list[torch.device]:
    """Returns the accelerators on which a model's weights are or come to be, in the order of the model."""
    found = dict.fromkeys(hook_devices(model))
    found.update((parameter.device, None) for parameter in model.parameters())
    return [device for device in found if is_accelerator(device)]


def block_device(block: nn.Module) -> torch.device:
    """Returns the device that a block is computed on: that of a hook of accelerate, or of its first weight."""
    own = (parameter.device for parameter in block.parameters())
    return next(hook_devices(block), None) or next(own, torch.device("cpu"))


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes of an accelerator that can still be taken, what torch keeps for itself included; None if unknown."""
    module = torch.get_device_module(device)
    try:
        free = int(module.mem_get_info(device)[0])
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    with suppress(AttributeError, RuntimeError):
        free += int(module.memory_reserved(device)) - int(module.memory_allocated(device))
    return free


def empty_caches(devices: Iterable[torch.device]) -> None:
    """Gives back the memory that torch keeps of devices, so that pieces of it can be joined."""
    for kind in {device.type for device in devices}:
        with suppress(AttributeError, RuntimeError):
            torch.get_device_module(kind).empty_cache()


class Parked:
    """Nested tensors that wait in the memory of the host; `back` gives them where they were."""

    def __init__(self, value: Any):
        self._value = tree_map_only(Tensor, lambda tensor: _Waiting(tensor.to("cpu"), tensor.device), value)

    def back(self) -> Any:
        """Returns the value with its tensors on their devices."""
        return tree_map_only(_Waiting, lambda waiting: waiting.tensor.to(waiting.device), self._value)


class _Waiting:
    def __init__(self, tensor: Tensor, device: torch.device):
        self.tensor, self.device = tensor, device
