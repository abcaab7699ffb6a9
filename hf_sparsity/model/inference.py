"""The evaluation mode of a model, other forwards for its modules, and the type of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# A batch as the model's forward takes it. Text batches have at least `input_ids` [sequences, tokens].
Batch = Mapping[str, Any]
_FLOATING = {
    "attention_mask",
    "decoder_attention_mask",
    "inputs_embeds",
    "decoder_inputs_embeds",
}  # that slices may have


def can_be_sliced(batch: Batch) -> bool:
    """Returns whether the first axis of every tensor is the sequences, so that `value[:1]` of each is the first of them.

    It is not where sequences have images or sound: patches of all images may be packed into one axis, and a sequence
    may have several images or none. So True only for tensors of the shape of the ids, and those of a decoder.
    """
    ids = batch.get("input_ids", batch.get("decoder_input_ids"))
    if not isinstance(ids, Tensor):
        return False
    return all(
        isinstance(value, Tensor)
        and value.ndim >= 2
        and len(value) == len(ids)
        and (name.startswith("decoder_") or value.shape[1] == ids.shape[1])
        and (name in _FLOATING or not value.is_floating_point())
        for name, value in batch.items()
    )


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Gives each module another `forward` inside; also code that calls `module.forward` itself meets it."""
    own = [module.__dict__.get("forward") for module in modules]  # accelerate's hooks live there too
    for module, new in zip(modules, forwards, strict=True):
        module.forward = new
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model in evaluation mode; after, each module is in the mode it was in before."""
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turns `torch.autocast` off, which would compute statistics and solve for weights in half precision."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", accelerator.type if accelerator is not None else "cpu"}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def experts_implementation(model: PreTrainedModel) -> dict[str, str | None] | None:
    """Returns how a model computes its experts, in the form that `set_experts_implementation` takes; None if it has no say."""
    if hasattr(model, "get_experts_implementation"):
        return model.get_experts_implementation()
    if not hasattr(model, "set_experts_implementation"):
        return None
    parts = {"": model.config, **{key: getattr(model.config, key, None) for key in model.config.sub_configs}}
    return {key: part._experts_implementation for key, part in parts.items() if part is not None}


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[None]:
    """Puts the model in evaluation mode with experts computed one by one, so that the inputs of each can be seen.

    After, both are as they were before.
    """
    experts = experts_implementation(model)
    with evaluating(model):
        try:
            if experts:
                model.set_experts_implementation("eager")
            yield
        finally:
            if experts:
                model.set_experts_implementation(experts)
