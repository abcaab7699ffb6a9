"""Packed or dense, by measurement: how long one product takes either way, for each kind of layer of a model, and what follows.

One vector is multiplied, as in decoding. Before each product other memory is read until nothing of the layer is left in
the caches, as it is when a whole model runs; else small dense layers would look faster than they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .install import packed_modules, uninstall
from .linear import Packed

REPEATS = 5  # of each product; some 20 ms for each kind of layer
FLUSH = 2**25  # bytes that are read before each product
STEP = 0.05  # layers of one shape whose shares of the dense bytes differ by less are one kind


@dataclass(frozen=True)
class LayerSpeed:
    """The measured times of a product with one vector: `packed` and `dense`, in seconds.

    `shape`: of the weight. `share`: packed bytes of the dense ones. `names`: the parameters of this kind.
    """

    shape: tuple[int, ...]
    share: float
    packed: float
    dense: float
    names: tuple[str, ...]

    @property
    def gains(self) -> bool:
        """True where the packed product is the faster one."""
        return self.packed <= self.dense


def layer_speeds(model: nn.Module) -> list[LayerSpeed]:
    """Measures each kind of packed layer of a model: one of each is unpacked for it, and thrown away."""
    kinds: dict[Any, list[tuple[str, Packed]]] = {}
    for name, module in packed_modules(model):
        kinds.setdefault((module.header.shape, module.header.dtype, round(_share(module) / STEP)), []).append(
            (name, module)
        )
    flush = torch.empty(FLUSH // 8, dtype=torch.int64).zero_()
    return [_measure(layers, flush) for layers in kinds.values()]


def _share(module: Packed) -> float:
    """Returns the packed bytes as a share of the dense ones in the model's dtype."""
    return module.packed.numel() / (module.header.size * module.dtype.itemsize)


def _measure(layers: list[tuple[str, Packed]], flush: Tensor) -> LayerSpeed:
    """Measures the first of some layers of one kind."""
    module = layers[0][1]
    rows = module.rows
    weight = rows.dense(0).to(module.dtype).contiguous()
    x = torch.ones(1, rows.width, dtype=module.dtype, device=weight.device)
    jobs: tuple[Callable[[], Tensor], ...] = (lambda: rows.multiply(x), lambda: functional.linear(x, weight))
    seconds: tuple[list[float], ...] = ([], [])
    with torch.inference_mode():
        for job in jobs:
            job()  # compiles
        for _ in range(REPEATS):
            for job, times in zip(jobs, seconds, strict=True):
                flush.sum()
                start = time.perf_counter()
                job()
                times.append(time.perf_counter() - start)
    packed, dense = map(median, seconds)
    share = sum(_share(module) for _, module in layers) / len(layers)
    return LayerSpeed(tuple(module.header.shape), share, packed, dense, tuple(name for name, _ in layers))


def unpack_slow_layers(model: PreTrainedModel) -> list[LayerSpeed]:
    """Measures the packed layers of a model, and makes those dense again that are multiplied faster so.

    Returns:
        What was measured, for `show_speeds`.
    """
    speeds = layer_speeds(model)
    slow = {name for speed in speeds if not speed.gains for name in speed.names}
    for name, module in list(packed_modules(model)):
        if name in slow:
            uninstall(model, name, module)
            model.get_parameter(name).requires_grad_(False)
    return speeds


def show_speeds(speeds: list[LayerSpeed]) -> str:
    """Returns a table of measured layers, the slowest first."""
    lines = [f"{'shape':>18s}  layers  bytes  packed ms  dense ms  times as fast"]
    for speed in sorted(speeds, key=lambda speed: -speed.packed):
        shape = " x ".join(map(str, speed.shape))
        lines.append(
            f"{shape:>18s}  {len(speed.names):6d}  {speed.share:4.0%}  {1000 * speed.packed:9.3f}  "
            f"{1000 * speed.dense:8.3f}  {speed.dense / speed.packed:13.2f}"
        )
    return "\n".join(lines)
