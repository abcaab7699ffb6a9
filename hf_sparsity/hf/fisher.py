"""Gradient energy per layer (MSP; the empirical Fisher information of Xu et al., arXiv 2503.11164).

A backward pass wants the whole model in memory. Where accelerate keeps a block's weights elsewhere, the
block is computed twice, each time with its weights lent: in the forward pass without a graph, in the
backward pass again with one, and nothing but the block's inputs is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .drive import Batch
from .layers import Block, Layout, Weight
from .offload import onload
from .processes import Processes


def fisher_information(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch], processes: Processes | None = None
) -> dict[str, float]:
    """Mean over sequences of the squared gradient norm of each prunable layer, float64.

    The loss is the token-mean cross-entropy with the true next tokens. Every sequence has a backward
    pass of its own (squaring the gradient of a batch mean would cancel). A gradient is summed and freed
    the moment it is complete, and activations are recomputed, so memory grows by one gradient only.
    Of a model dispatched by accelerate the weights of one block at a time are in memory.

    With `processes`, each takes its share of the sequences; all must call this with the same batches.

    Raises:
        ValueError: batches without `input_ids`, a model without a language-model loss.
    """
    processes = processes or Processes()
    if not all("input_ids" in batch for batch in batches):
        raise ValueError("Fisher information needs text: batches with input_ids")
    sequences = [(batch, row) for batch in batches for row in range(batch["input_ids"].shape[0])]
    energy = _Energy(layout)
    with _differentiable(model, layout, energy):
        mine = processes.share(sequences)
        hidden = processes.hide_bars
        for batch, row in tqdm(mine, desc="Fisher information", unit="sequence", disable=hidden, leave=False):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items() if name != "decoder_input_ids"}
            labels = one["input_ids"]
            if "attention_mask" in one:
                labels = labels.masked_fill(one["attention_mask"] == 0, -100)
            loss = getattr(model(**one, labels=labels, use_cache=False), "loss", None)
            if loss is None:
                raise ValueError(
                    f"{type(model).__name__} returns no loss for labels; Fisher information needs a language model"
                )
            loss.backward()
            energy.flush()
    sums = torch.stack([energy.sums[name] for name in layout.weights])
    means = processes.sum(sums) / len(sequences)
    return dict(zip(layout.weights, means.tolist(), strict=True))


class _Energy:
    """Takes the prunable parameters' gradients as they are completed, sums their squares by layer, and frees them."""

    def __init__(self, layout: Layout):
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in layout.weights}
        self._visits: dict[str, int] = {}  # of lent blocks in this forward pass, whose gradients are yet to come
        self._pending: dict[str, tuple[Tensor, list[Weight]]] = {}  # of a block that the model runs several times
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}

    def watch(self, block: Block) -> None:
        """Asks for the gradients of a block's prunable parameters, which must be there; again if they are others now."""
        sharing: dict[str, list[Weight]] = {}
        for weight in block.weights.values():
            sharing.setdefault(weight.parameter, []).append(weight)
        for name, weights in sharing.items():
            parameter = weights[0].module._parameters[weights[0].attribute]
            assert parameter is not None
            if name in self._hooks:
                self._hooks[name].remove()
            take = partial(self._take, block.name, weights)
            self._hooks[name] = parameter.requires_grad_(True).register_post_accumulate_grad_hook(take)

    def visit(self, block: Block, by: int) -> None:
        """Counts the runs of a lent block: +1 in the forward pass, -1 in the backward pass."""
        self._visits[block.name] = self._visits.get(block.name, 0) + by

    def flush(self) -> None:
        """After a backward pass: adds what waited for a visit on which the loss does not depend."""
        for gradient, weights in self._pending.values():
            self._add(gradient, weights)
        self._pending.clear()
        self._visits.clear()

    def release(self) -> None:
        """Stops watching."""
        for hook in self._hooks.values():
            hook.remove()
        self._pending.clear()

    def _take(self, block: str, weights: list[Weight], parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        name = weights[0].parameter
        if name in self._pending:
            gradient = self._pending.pop(name)[0] + gradient
        if self._visits.get(block, 0) > 0:  # the square is that of the sum over all visits
            self._pending[name] = gradient, weights
        else:
            self._add(gradient, weights)

    def _add(self, gradient: Tensor, weights: list[Weight]) -> None:
        for weight in weights:
            part = gradient if weight.expert is None else gradient[weight.expert]
            self.sums[weight.name] += part.to(torch.float32).square().sum().to("cpu", torch.float64)


@contextmanager
def _differentiable(model: PreTrainedModel, layout: Layout, energy: _Energy) -> Iterator[None]:
    """Gradients for the prunable weights only, blocks recomputed, dropout off; everything restored after."""
    before = {(module, name): (p.requires_grad, p.grad) for module, name, p in _parameters(model)}
    training = {module: module.training for module in model.modules()}
    forwards = {block.module: block.module.__dict__.get("forward") for block in layout.blocks}  # accelerate's, if any
    try:
        model.eval()
        for _, _, parameter in _parameters(model):
            parameter.grad = None
            parameter.requires_grad_(False)
        for block in layout.blocks:
            if any(parameter.device.type == "meta" for parameter in block.module.parameters()):
                block.module.forward = _lent_forward(block, energy)
                continue
            energy.watch(block)
            # Not by the model's own switch: it needs the block in training mode, and OPT's then drops activations.
            if isinstance(block.module, GradientCheckpointingLayer):
                block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False)
        with torch.enable_grad():
            yield
    finally:
        energy.release()
        for module, forward in forwards.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
        for module, name, parameter in _parameters(model):  # lent ones have become other objects, but in their places
            wants, gradient = before[module, name]
            parameter.requires_grad_(wants)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]


def _lent_forward(block: Block, energy: _Energy) -> Callable[..., Any]:
    """The forward of an offloaded block that borrows the weights, once in the forward and once in the backward pass.

    It is the reentrant kind of checkpoint, whose recomputation has a graph of its own that begins with the weights
    lent to it. The other kind keeps the first graph, and so every block's first loan until its gradients come.
    """
    original = block.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs, structure = tree_flatten((args, kwargs))
        shape: Any = None

        def run(_: Tensor, *inputs: Any) -> tuple[Any, ...]:
            nonlocal shape
            args, kwargs = tree_unflatten(inputs, structure)
            before = _keys(inputs)
            again = torch.is_grad_enabled()
            with onload(block.module):
                energy.visit(block, -1 if again else 1)
                if again:
                    energy.watch(block)
                output = original(*args, **kwargs)
            if tree_flatten((args, kwargs))[1] != structure or _keys(inputs) != before:
                raise ValueError(
                    f"{block.name} changes its arguments for other blocks to see; "
                    "load the model without offload for Fisher information"
                )
            outputs, shape = tree_flatten(output)
            return tuple(outputs)

        if not block.weights and not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            with onload(block.module):  # nothing before or in this block wants a gradient
                return original(*args, **kwargs)
        # Embeddings want no gradient: without an input that does, the first block would have no backward pass.
        anchor = torch.empty(0, requires_grad=bool(block.weights))
        return tree_unflatten(checkpoint(run, anchor, *inputs, use_reentrant=True, preserve_rng_state=False), shape)

    return forward


def _keys(inputs: Sequence[Any]) -> list[list[Any]]:
    """Of the mappings among the inputs that are not dicts: Gemma-3n's blocks hand on keys and values in one."""
    return [list(x) for x in inputs if isinstance(x, Mapping)]
