"""Gradient energy per layer (MSP; the empirical Fisher information of Xu et al., arXiv 2503.11164)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..distributed import Processes
from ..model.inference import Batch, can_be_sliced
from ..model.layers import Block, ModelLayers, Weight
from ..progress import follow
from ..streaming.gradients import BlocksNotAlone, Gradients, differentiable


def fisher_information(
    model: PreTrainedModel, model_layers: ModelLayers, batches: Sequence[Batch], processes: Processes | None = None
) -> dict[str, float]:
    """Mean over sequences of the squared gradient norm of each prunable layer, float64.

    The loss is the token-mean cross-entropy with the true next tokens. Every sequence has a backward
    pass of its own (squaring the gradient of a batch mean would cancel). A gradient is summed and freed
    the moment it is complete, and activations are recomputed, so memory grows by one gradient only.
    Of a model dispatched by accelerate the weights of one block at a time are in memory.

    With `processes`, each takes its share of the sequences; all must call this with the same batches.

    Raises:
        ValueError: batches without `input_ids` or `decoder_input_ids`, a model without a language-model loss; `BlocksNotAlone` for an
            offloaded model whose blocks cannot be computed one by one.
    """
    processes = processes or Processes()
    if not all({"input_ids", "decoder_input_ids"} & batch.keys() for batch in batches):
        raise ValueError("Fisher information needs text: batches with input_ids, or with a decoder's")
    sequences = [
        (batch, row)
        for batch in batches
        for row in range(len(batch["input_ids"] if "input_ids" in batch else batch["decoder_input_ids"]))
    ]
    energy = _Energy(model_layers)
    try:
        with differentiable(model, model_layers, energy):
            mine = processes.share(sequences)
            for batch, row in follow(mine, "Fisher information", "sequence", shown=processes.main):
                _loss(model, batch, row).backward()
                energy.flush()
    except BlocksNotAlone as error:
        raise BlocksNotAlone(f"{error}; load the model without offload for Fisher information") from None
    sums = torch.stack([energy.sums[name] for name in model_layers.weights])
    means = processes.sum(sums) / len(sequences)
    return dict(zip(model_layers.weights, means.tolist(), strict=True))


def _loss(model: PreTrainedModel, batch: Batch, row: int) -> Tensor:
    """Returns the loss of one sequence; padding does not count.

    A batch that cannot be cut into sequences (see `can_be_sliced`) runs whole, and the other sequences do not count.
    """
    ids, decoder = batch.get("input_ids"), batch.get("decoder_input_ids")
    of_decoder = decoder is not None and (ids is None or ids.shape != decoder.shape or not torch.equal(ids, decoder))
    # An encoder-decoder that was given one text is to write it again; given two, to write the second.
    inputs = {name: tensor for name, tensor in batch.items() if of_decoder or not name.startswith("decoder_")}
    if can_be_sliced(inputs):
        inputs = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        row = 0
    side = "decoder_" if of_decoder else ""
    labels = inputs[f"{side}input_ids"]
    mask = inputs.get(f"{side}attention_mask")
    if mask is not None and mask.ndim == 2:
        labels = labels.masked_fill(mask == 0, -100)
    if of_decoder:  # what comes after each token that it reads
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    others = torch.arange(len(labels), device=labels.device) != row
    labels = labels.masked_fill(others[:, None], -100)
    loss = getattr(model(**inputs, labels=labels, use_cache=False), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for labels; Fisher information needs a language model"
        )
    return loss


class _Energy(Gradients):
    """Sums the squares of the gradients of each layer."""

    def __init__(self, model_layers: ModelLayers):
        super().__init__()
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in model_layers.weights}
        self._fresh: dict[str, list[Tensor]] = {}  # layer -> of this backward pass, on the device of the layer
        self._visits: dict[str, int] = {}  # of lent blocks in this forward pass, whose gradients are yet to come
        self._pending: dict[str, tuple[Tensor, list[Weight]]] = {}  # of a block that the model runs several times

    def visit(self, block: Block, by: int) -> None:
        """Counts the runs of the block whose gradients are still to come."""
        self._visits[block.name] = self._visits.get(block.name, 0) + by

    def taker(self, block: Block, weights: list[Weight]) -> Callable[[Tensor], None]:
        """Returns what adds a gradient's square; a block that runs several times is squared after the sum over its runs."""
        return partial(self._take, block, weights)

    def _take(self, block: Block, weights: list[Weight], parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        name = weights[0].parameter
        if name in self._pending:
            gradient = self._pending.pop(name)[0] + gradient
        if self._visits.get(block.name, 0) > 0:
            self._pending[name] = gradient, weights
        else:
            self._add(gradient, weights)

    def flush(self) -> None:
        """Adds, after a backward pass, the gradients that waited for a run on which the loss does not depend."""
        for gradient, weights in self._pending.values():
            self._add(gradient, weights)
        self._pending.clear()
        self._visits.clear()
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, parts in self._fresh.items():
            for part in parts:
                by_device.setdefault(part.device, []).append((name, part))
        for several in by_device.values():  # together: a device makes the host wait for each that is asked for
            values = torch.stack([part for _, part in several]).to("cpu", torch.float64)
            for (name, _), value in zip(several, values, strict=True):
                self.sums[name] += value
        self._fresh.clear()

    def release(self) -> None:
        """Removes the hooks from the model."""
        super().release()
        self._pending.clear()

    def _add(self, gradient: Tensor, weights: list[Weight]) -> None:
        for weight in weights:
            part = gradient if weight.expert is None else gradient[weight.expert]
            self._fresh.setdefault(weight.name, []).append(part.to(torch.float32).square().sum())
