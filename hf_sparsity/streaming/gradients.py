"""A backward pass for the gradients of the prunable weights, a parameter at a time; memory grows by one gradient.

A backward pass wants the whole model in memory. A block whose weights are lent (accelerate keeps them elsewhere, or others
stand in for them) is computed twice, each time with its weights lent anew: in the forward pass without a graph, in the
backward pass again with one, and nothing but the block's inputs is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..model.layers import Block, ModelLayers, Weight
from ..model.offload import onload


class BlocksNotAlone(ValueError):
    """Raised when a block passes more to other blocks than it returns, so that it cannot be computed again by itself."""


class Gradients:
    """Receives the gradient of each prunable parameter as soon as it is complete, through `taker`, and frees it."""

    def __init__(self) -> None:
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}

    def lends(self, block: Block) -> bool:
        """Returns whether the block's weights are lent: here, whether they are kept elsewhere."""
        return any(parameter.device.type == "meta" for parameter in block.module.parameters())

    def lend(self, block: Block) -> AbstractContextManager[Any]:
        """Returns a context inside which the block has its weights."""
        return onload(block.module)

    def visit(self, block: Block, by: int) -> None:
        """Takes note of a run of a lent block: `by` is +1 in the forward pass, -1 in the backward pass."""

    def taker(self, block: Block, weights: list[Weight]) -> Callable[[Tensor], None]:
        """Returns a function to be called with the parameter of these weights when its `grad` is complete.

        The `grad` is of one run of the block, and the function sets it to None. This is called while the block has
        its weights.
        """
        raise NotImplementedError

    def watch(self, block: Block) -> None:
        """Asks for the gradients of a block's prunable parameters, which must be in memory; again if they were exchanged."""
        sharing: dict[str, list[Weight]] = {}
        for weight in block.weights.values():
            sharing.setdefault(weight.parameter, []).append(weight)
        for name, weights in sharing.items():
            if name in self._hooks:
                self._hooks[name].remove()
            taker = self.taker(block, weights)
            parameter = weights[0].stored.requires_grad_(True)
            self._hooks[name] = parameter.register_post_accumulate_grad_hook(taker)

    def release(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks.values():
            hook.remove()


@contextmanager
def differentiable(model: PreTrainedModel, model_layers: ModelLayers, gradients: Gradients) -> Iterator[None]:
    """Lets a backward pass give gradients to the prunable weights only: blocks recomputed, dropout off, all restored after."""
    before = {(module, name): (p.requires_grad, p.grad) for module, name, p in _parameters(model)}
    training = {module: module.training for module in model.modules()}
    forwards = {
        block.module: block.module.__dict__.get("forward") for block in model_layers.blocks
    }  # accelerate's, if any
    try:
        model.eval()
        for _, _, parameter in _parameters(model):
            parameter.grad = None
            parameter.requires_grad_(False)
        for block in model_layers.blocks:
            if gradients.lends(block):
                block.module.forward = _lent_forward(block, gradients)
                continue
            gradients.watch(block)
            # Not by the model's own switch: it needs the block in training mode, and OPT's then drops activations.
            if isinstance(block.module, GradientCheckpointingLayer):
                block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False)
        with torch.enable_grad():
            yield
    finally:
        gradients.release()
        for module, forward in forwards.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
        for module, name, parameter in _parameters(
            model
        ):  # lent parameters are other objects by now, in the same places
            wants, gradient = before[module, name]
            parameter.requires_grad_(wants)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode


def _parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]


def _lent_forward(block: Block, gradients: Gradients) -> Callable[..., Any]:
    """Returns a forward for a block that borrows its weights, once in the forward and once in the backward pass.

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
            with gradients.lend(block):
                gradients.visit(block, -1 if again else 1)
                if again:
                    gradients.watch(block)
                output = original(*args, **kwargs)
            if tree_flatten((args, kwargs))[1] != structure or _keys(inputs) != before:
                raise BlocksNotAlone(
                    f"{block.name} changes its arguments for other blocks to see, so it cannot be computed again by itself"
                )
            outputs, shape = tree_flatten(output)
            return tuple(outputs)

        if not block.weights and not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            with gradients.lend(block):  # neither this block nor one before it needs a gradient
                return original(*args, **kwargs)
        # Embeddings need no gradient: without an input that does, the first block would have no backward pass.
        anchor = torch.empty(0, requires_grad=bool(block.weights))
        return tree_unflatten(checkpoint(run, anchor, *inputs, use_reentrant=True, preserve_rng_state=False), shape)

    return forward


def _keys(inputs: Sequence[Any]) -> list[list[Any]]:
    """Returns the keys of the inputs that are mappings but no dicts: Gemma-3n's blocks pass keys and values on in one."""
    return [list(x) for x in inputs if isinstance(x, Mapping)]
