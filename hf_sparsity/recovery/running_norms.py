"""Norms of the inputs of layers whose weights are being trained, for Wanda's scores."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import NORMS
from ..core.stats import InputStats
from ..distributed import sum_over_processes
from ..model.inference import prepared
from ..model.layers import Weight
from ..streaming.fallback import FEWEST_TOKENS
from ..streaming.observer import InputObserver
from ..streaming.operands import Operands
from .real_tokens import RealTokens

MEMORY = 0.9  # share of the earlier batches in the running input norms at each update


class RunningNorms:
    """Mean square of each layer's input columns, an average over the batches of past updates that slowly forgets.

    At each update the last training batch goes forward once more, experts one by one, so that every product is seen
    whatever kernels training itself uses. What is repeated is the forward of the model without its head, with the
    inputs it got: trainers put losses of their own into the whole model's forward. Norms are shared between processes,
    so that all come to the same masks.
    """

    def __init__(self, weights: list[Weight]):
        self.weights = weights
        self.mean_sq: dict[str, Tensor] = {}
        self._inputs: dict[str, Any] | None = None
        self._autocast: Any = nullcontext()

    def watch(self, model: PreTrainedModel) -> Any:
        """Remembers the inputs of each training forward from now on; returns the handle of the hook that does."""
        return self._body(model).register_forward_pre_hook(self._remember, with_kwargs=True)

    def forget(self) -> None:
        """Lets the last batch go."""
        self._inputs = None

    def _body(self, model: PreTrainedModel) -> Any:
        """Returns the model without its head, if that has all the layers."""
        body = model.base_model
        inside = set(map(id, body.modules()))
        return body if all(id(weight.module) in inside for weight in self.weights) else model

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # storing the inputs is no part of the model
    def _remember(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not module.training:
            return
        names = inspect.signature(type(module).forward).parameters
        inputs = dict(zip(list(names)[1:], args, strict=False)) | dict(kwargs)
        self._inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        kind = next(module.parameters()).device.type
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    @torch.no_grad()
    def observe(self, model: PreTrainedModel) -> None:
        """Adds the last training batch; padding is left out where it can be told.

        Raises:
            ValueError: no training forward was seen.
        """
        body, batch = self._body(model), self._inputs
        if batch is None:
            raise ValueError(
                f"no training forward of {type(body).__name__} was seen before masks were due: the trainer calls parts of "
                "the model itself. Use pruner='magnitude', which needs no inputs"
            )
        real = RealTokens(body, batch)
        sums = {w.name: torch.zeros(w.shape[1] + 1, device=w.read().device) for w in self.weights}

        def add(weight: Weight, inputs: Tensor, _in_order: bool) -> None:
            rows = real.rows(weight, inputs).float()
            sums[weight.name][:-1] += rows.square().sum(dim=0)
            sums[weight.name][-1] += rows.shape[0]

        with prepared(model), self._autocast, real.watching(), InputObserver(Operands(self.weights), add):
            _forward(body, batch)
        for name, total in sums.items():
            sum_over_processes(total)
            if total[-1] >= FEWEST_TOKENS:
                mean = total[:-1] / total[-1]
                before = self.mean_sq.get(name, mean)
                self.mean_sq[name] = MEMORY * before + (1 - MEMORY) * mean

    def stats(self, weight: Weight) -> InputStats:
        """Returns a layer's norms for a pruner; all equal, which means magnitude, for an expert with too few tokens."""
        needs = frozenset({NORMS})
        if weight.name not in self.mean_sq:
            return InputStats.flat(needs, weight.shape[1], 1.0, weight.read().device)
        stats = InputStats(needs)
        stats.mean_sq = self.mean_sq[weight.name]
        return stats


def _forward(body: Any, batch: Mapping[str, Any]) -> None:
    """Runs the class's own forward, since trainers replace the instance's; without a loss and without a cache."""
    dropped = {"num_items_in_batch", "use_cache", "past_key_values"}
    if not body.config.is_encoder_decoder:  # which makes the decoder's inputs of labels
        dropped.add("labels")
    parameters = inspect.signature(type(body).forward).parameters.values()
    takes_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    inputs = {name: value for name, value in batch.items() if name not in dropped}
    type(body).forward(body, **inputs, **({"use_cache": False} if takes_cache else {}))
