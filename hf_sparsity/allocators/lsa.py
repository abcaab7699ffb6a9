"""LSA: layer-wise sparsity from the least error that half of the weights would cost.

Yang et al., ICLR 2026, https://openreview.net/forum?id=xq3lza5IjN.
Checked against the authors' code, BeiYazi0/LSA, layersp/blk.py (blk_s, blk_score, blk_score_global).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithm import GRAM, Allocator, Layer, ModelOracle, Pruner
from ..core.allocation import check_per, check_spread, rising_with_measure
from ..validation import check_number

TILE = 1 << 15  # numbers of a group treated at a time on a CPU, so that they fit its caches
WIDE_TILE = 1 << 24  # numbers treated at a time on an accelerator


@dataclass(frozen=True)
class LSA(Allocator):
    """Prunes half of each layer on trial, greedily and without compensation; layers with the largest errors get sparsest.

    Removing weight j of a row adds `H_jj w_j^2 + 2 w_j sum_i w_i H_ij` to the squared error of its output, i over
    those removed already, H the Gram matrix of the inputs. Each group of `columns` gives up its cheapest, one
    at a time; the sum is the layer's error, a block's the plain mean over its layers. As in DLP, the importance `1 - error / sum`
    makes the blocks with the largest errors the sparsest: those are the late ones, whose activations are large.

    Deliberate differences: equal errors give uniform; a last group narrower than `columns` gives up the same fraction,
    not the same number; with `*:M` sparsities are rounded as for any allocator. `per="layer"` is the authors'
    projection-wise variant, but here `spread` limits sparsities: theirs is multiplied by mean size / size,
    which carries the small k and v of grouped-query attention beyond [0, 1].
    """

    spread: float | None = None  # alpha: sparsities span 2 * spread. None: by the target, see core/allocation.py
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer, the authors' with a spread of 0.07
    columns: int = 128  # inputs of a group
    trial: float = 0.5  # the fraction of each group that goes on trial

    name = "lsa"
    paper = "https://openreview.net/forum?id=xq3lza5IjN"
    summary = "blocks where a trial pruning of half the weights costs most lose more"
    needs = frozenset({GRAM})
    measure_label = "error of the output at half"
    only_in_assign = ("spread", "per")
    race_grid = {"spread": (0.05, 0.15)}

    def __post_init__(self) -> None:
        check_per(self.per)
        check_spread(self.name, self.spread)
        check_number("lsa: trial", self.trial, "(0, 1)")
        check_number("lsa: columns", self.columns, "[2, inf)", whole=True)

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """Returns each layer's error, in the authors' units: twice the mean over sequences of the sum of squares."""
        errors = {}
        for name, layer in block.items():
            if layer.stats is None or layer.stats.gram is None:
                raise ValueError(f"{name}: lsa needs the Gram matrix of the layer's inputs, and none was collected")
            error = greedy_error(layer.weight, layer.stats.gram, columns=self.columns, trial=self.trial)
            errors[name] = error * 2 / max(layer.stats.sequences, 1)
        return errors

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """The published mapping, its mean unweighted by size; a sparsity of 0 or less becomes 0.01."""
        # `1 - error / sum` is linear in the error, and what follows sees no more than the order and the distances.
        return rising_with_measure(measures, self.per, target, self.spread)


def greedy_error(weight: Tensor, gram: Tensor, *, columns: int = 128, trial: float = 0.5) -> float:
    """`sum over rows of r H r^T`, r the removed weights of a row: what a greedy choice of them costs.

    `weight`: `[out, in]`; `gram`: `[in, in]` float32. In each group of `columns`, left to right, `int(trial * width)` of
    every row go, always the one that adds least to what is gone. Exact products, float32; sums in float64.
    """
    numbers = TILE if weight.device.type == "cpu" else WIDE_TILE
    rows = max(1, numbers // min(columns, weight.shape[1]))
    return math.fsum(_tile_error(part.float(), gram, columns, trial) for part in torch.split(weight, rows))


def _tile_error(weight: Tensor, gram: Tensor, columns: int, trial: float) -> float:
    gone = torch.zeros_like(weight)  # the removed weights
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], columns):
        part = slice(start, start + columns)
        w, h = weight[:, part], gram[part, part]
        cost = w.square() * h.diagonal()
        if start:
            cost += 2 * w * (gone[:, :start] @ gram[:start, part])
        for _ in range(int(trial * w.shape[1])):
            least, index = cost.min(dim=1, keepdim=True)
            total += least.sum(dtype=torch.float64)
            removed = w.gather(1, index)
            cost.addcmul_(h[index[:, 0]] * w, removed, value=2)
            cost.scatter_(1, index, math.inf)
            gone[:, part].scatter_(1, index, removed)
    return float(total)
