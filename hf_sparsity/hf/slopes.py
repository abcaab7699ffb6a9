"""What one weight less in each layer would cost: the slope of the divergence, for all layers from one backward pass.

Pruning the weight `w` of a masked model changes the divergence by `-g w` to first order, `g` being its gradient; giving
back one that is masked by `+g w`, for it has a gradient, too. A layer's slope is the mean of `-g w` over the weights that
are next to go or to come back. Masks are put on one block at a time, so a gradient is all that memory grows by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.ranks import Ranks
from .backward import Gradients, differentiable
from .drive import Batch, drive, prepared
from .judge import by_token, masked
from .layers import Block, Layout, Weight
from .offload import onload

PASSES = 4  # what it takes, in forward passes: forward, forward again, and backward, which is two

Sums = list[float]  # of `-g w` for each layer; and last the number of predictions


class Slopes:
    """`sums(steps, batch, dense)`: a batch's part, of a model masked to these steps of its layers' ranks.

    Raises `BlocksNotAlone` for models whose blocks cannot be computed one by one.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, ranks: Mapping[str, Ranks], metric: str):
        """`metric`: "kl" or "loss"."""
        self._model, self._layout, self._ranks, self._metric = model, layout, ranks, metric

    def sums(self, steps: Mapping[str, int], batch: Batch, dense: Tensor) -> Sums:
        """In the order of `steps`, summed over the batch's predictions; `dense`: the dense model's logits."""
        gradients = _Masked(self._ranks, steps)
        count = 0.0

        def backward(batch: Batch, output: object) -> None:
            nonlocal count
            kl, loss, real = by_token(batch, dense, output.logits)  # type: ignore[attr-defined]
            count = float(real.sum())
            ((kl if self._metric == "kl" else loss) * real).sum().backward()

        with prepared(self._model), differentiable(self._model, self._layout, gradients):
            drive(self._model, backward)(**batch)
        return [*(float(gradients.sums.get(name, 0.0)) for name in steps), count]


def window(ranks: Ranks, step: int) -> tuple[int, int]:
    """The steps between which a layer's slope is taken: a sixteenth of all on either side."""
    width = max(1, len(ranks.zeros) // 16)
    return max(0, step - width), min(len(ranks.zeros) - 1, step + width)


class _Masked(Gradients):
    """Lends masked weights, and sums what their gradients say."""

    def __init__(self, ranks: Mapping[str, Ranks], steps: Mapping[str, int]):
        super().__init__()
        self._ranks, self._steps = ranks, steps
        self._dense: dict[str, Tensor] = {}  # parameters of the block that is lent
        self.sums: dict[str, float] = {}

    def lends(self, block: Block) -> bool:
        """All are."""
        return True

    @contextmanager
    def lend(self, block: Block) -> Iterator[None]:
        """Its own weights if they are elsewhere, masked."""
        masks = {name: self._ranks[name].mask(step) for name in block.weights if (step := self._steps[name])}
        with onload(block.module):
            self._dense = {w.parameter: _parameter(w).detach() for w in block.weights.values()}
            with masked(block, masks):
                yield
            self._dense = {}

    def taker(self, block: Block, weights: list[Weight]) -> Callable[[Tensor], None]:
        """Adds up to each layer's sum; keeps the dense weights until then."""
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
            self.sums[weight.name] = self.sums.get(weight.name, 0.0) - float(
                product.mul_(near).sum(dtype=torch.float64)
            )


def _parameter(weight: Weight) -> nn.Parameter:
    parameter = weight.module._parameters[weight.attribute]
    assert parameter is not None
    return parameter
