"""Gradient energy per layer (MSP; the empirical Fisher information of Xu et al., arXiv 2503.11164)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .layers import Layout, Weight
from .stream import Batch


def fisher_information(model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean over sequences of the squared gradient norm of each prunable layer, float64.

    The loss is the token-mean cross-entropy with the true next tokens. Every sequence has a backward
    pass of its own (squaring the gradient of a batch mean would cancel). A gradient is summed and freed
    the moment it is complete, and activations are recomputed, so memory grows by one gradient only.

    Raises:
        ValueError: batches without `input_ids`, a model without a language-model loss, or weights offloaded by accelerate.
    """
    weights: dict[int, list[Weight]] = {}
    for weight in layout.weights.values():
        parameter = weight.module._parameters[weight.attribute]
        assert parameter is not None
        if parameter.device.type == "meta":
            raise ValueError(
                "Fisher information needs the weights in memory for a backward pass; load the model without offload"
            )
        weights.setdefault(id(parameter), []).append(weight)
    sums = {name: torch.zeros((), dtype=torch.float64) for name in layout.weights}

    def absorb(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for weight in weights[id(parameter)]:
            part = gradient if weight.expert is None else gradient[weight.expert]
            sums[weight.name] += part.to(torch.float32).square().sum().to("cpu", torch.float64)

    sequences = 0
    with _differentiable(model, layout, absorb):
        for batch in tqdm(batches, desc="Fisher information", unit="batch", disable=None, leave=False):
            if "input_ids" not in batch:
                raise ValueError("Fisher information needs text: batches with input_ids")
            for row in range(batch["input_ids"].shape[0]):
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
                sequences += 1
    return {name: float(total) / sequences for name, total in sums.items()}


@contextmanager
def _differentiable(model: PreTrainedModel, layout: Layout, absorb: Callable[[Tensor], None]) -> Iterator[None]:
    """Gradients for the prunable weights only, blocks checkpointed, dropout off; everything restored after."""
    wanted = {id(w.module._parameters[w.attribute]) for w in layout.weights.values()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    # transformers 5.2x renames gradient checkpointing to activation checkpointing.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    checkpointing = getattr(model, f"is_{word}_checkpointing")
    hooks = []
    try:
        model.eval()
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
            if id(parameter) in wanted:
                hooks.append(parameter.register_post_accumulate_grad_hook(absorb))
        if getattr(model, "supports_gradient_checkpointing", False):
            if not checkpointing:
                getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
            for block in layout.blocks:
                block.module.training = True  # the block alone: it checkpoints, while its dropout layers stay off
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        if getattr(model, "supports_gradient_checkpointing", False) and not checkpointing:
            getattr(model, f"{word}_checkpointing_disable")()
        for parameter, wants in before.items():
            parameter.requires_grad_(wants)
            parameter.grad = gradients[parameter]
        for module, mode in training.items():
            module.training = mode
