"""The slope of the divergence in each layer: what pruning one more weight would cost, from one backward pass for all.

Pruning a weight `w` of a masked model changes the divergence by `-g w` to first order, where `g` is its gradient;
restoring a masked weight changes it by `+g w`, since masked weights have gradients too. A layer's slope is the mean of
`-g w` over the weights that are next to be pruned or restored. One block is masked at a time, so memory grows by one
gradient only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.nested_masks import Ranks
from ...evaluation.divergence import DenseReference, by_token
from ...model.classes import text_config
from ...model.inference import Batch, can_be_sliced, prepared
from ...model.layers import Block, Weight
from ...model.masked import masked
from ...model.offload import onload
from ...streaming.forward import drive
from ...streaming.gradients import Gradients, differentiable

PASSES = 4  # cost in forward passes: forward, forward again, and backward, which counts as two

INPUTS, SHARE = 2**25, 16  # memory for block inputs: the larger of 32 MiB and 1/16 byte per weight

Sums = list[float]  # the sum of `-g w` for each layer, in the order of the steps; last the number of predictions


def layer_sensitivities(
    reference: DenseReference, number: int, ranks: Mapping[str, Ranks], steps: Mapping[str, int], metric: str
) -> Sums:
    """Returns the sums for one batch, of the model masked to these steps of its layers' ranks.

    Args:
        reference: the model and its dense outputs.
        number: which of the reference's batches.
        ranks: the nested masks of each layer.
        steps: the step of each layer.
        metric: "kl" or "loss".

    Raises:
        BlocksNotAlone: the model's blocks cannot be computed one by one.
    """
    model, gradients = reference.model, _Masked(ranks, steps)
    parts, count = _parts(reference, number), 0.0

    def backward(dense: Tensor, batch: Batch, output: Any) -> None:
        nonlocal count
        kl, loss, real = by_token(batch, dense, output.logits)
        count += float(real.sum())
        ((kl if metric == "kl" else loss) * real).sum().backward()

    with prepared(model), differentiable(model, reference.model_layers, gradients):
        for batch, dense in parts:
            drive(model, partial(backward, dense))(**batch)
    sums = gradients.sums
    return [*(sums.get(name, 0.0) for name in steps), count]


def window(ranks: Ranks, step: int) -> tuple[int, int]:
    """Returns the steps between which a layer's slope is taken: a sixteenth of all steps to either side."""
    width = max(1, len(ranks.zeros) // 16)
    return max(0, step - width), min(len(ranks.zeros) - 1, step + width)


def _parts(reference: DenseReference, number: int) -> list[tuple[Batch, Tensor]]:
    """The batch with the dense logits, cut into a few sequences at a time, since a backward pass keeps all blocks' inputs."""
    model, model_layers = reference.model, reference.model_layers
    batch, dense = reference.batches[number], reference.dense_logits(number)
    width = getattr(text_config(model.config), "hidden_size", None) or 1
    each = len(model_layers.blocks) * dense.shape[1] * width * dense.element_size()
    limit = max(INPUTS, sum(weight.size for weight in model_layers.weights.values()) // SHARE)
    count = max(limit // each, 1)
    if count >= len(dense) or not can_be_sliced(batch):
        return [(batch, dense)]
    pieces = [slice(start, start + count) for start in range(0, len(dense), count)]
    return [({name: value[piece] for name, value in batch.items()}, dense[piece]) for piece in pieces]


class _Masked(Gradients):
    """Lends masked weights to the backward pass, and sums `-g w` from their gradients."""

    def __init__(self, ranks: Mapping[str, Ranks], steps: Mapping[str, int]):
        super().__init__()
        self._ranks, self._steps = ranks, steps
        self._dense: dict[str, Tensor] = {}  # parameters of the block that is lent
        self._parts: dict[str, Tensor] = {}  # layer -> its sum so far, float64 on the layer's device

    def lends(self, block: Block) -> bool:
        """True for every block: each is computed with masked copies of its weights."""
        return True

    @contextmanager
    def lend(self, block: Block) -> Iterator[None]:
        """Puts masked weights into the block, which are loaded first if they are offloaded."""
        masks = {name: self._ranks[name].mask(step) for name in block.weights if (step := self._steps[name])}
        with onload(block.module):
            self._dense = {w.parameter: w.stored.detach() for w in block.weights.values()}
            with masked(block, masks):
                yield
            self._dense = {}

    def taker(self, block: Block, weights: list[Weight]) -> Callable[[Tensor], None]:
        """Returns what adds a parameter's gradient to the sums of its layers; it keeps the dense weights until then."""
        return partial(self._take, weights, self._dense[weights[0].parameter])

    def _take(self, weights: list[Weight], dense: Tensor, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for weight in weights:
            ranks = self._ranks[weight.name]
            first, last = window(ranks, self._steps[weight.name])
            survives = ranks.survives.to(gradient.device)
            near = (survives >= first) & (survives < last)
            product = weight.part(gradient).float() * weight.part(dense).float()
            part = product.mul_(near).sum(dtype=torch.float64)
            self._parts[weight.name] = self._parts.get(weight.name, torch.zeros_like(part)) - part

    @property
    def sums(self) -> dict[str, float]:
        """Returns the sum of `-g w` of each layer that had a gradient; a device is asked for all of its layers at once."""
        sums: dict[str, float] = {}
        for device in {part.device for part in self._parts.values()}:
            here = {name: part for name, part in self._parts.items() if part.device == device}
            sums |= zip(here, torch.stack(list(here.values())).tolist(), strict=True)
        return sums
