"""`hold_zeros`: zeros held in a training loop of one's own, with plain PyTorch or accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..model.sparsity import fit_names, model_plan
from ..plan import Plan
from .checks import as_plan, check_has_zeros, check_supported, fitting_layers, unwrapped
from .deepspeed import optimizer_of
from .record import TrainingRecord
from .zero_masks import ZeroMasks


@contextmanager
def hold_zeros(
    model: Any,
    optimizer: Any,
    *,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Iterator[ZeroMasks]:
    """Holds every zero of a sparse model while you train it in your own loop.

        model, optimizer = accelerator.prepare(model, optimizer)
        with hold_zeros(model, optimizer):
            for batch in data:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    The held zeros are those that the planned layers have at the beginning. They are exactly 0 after every
    `optimizer.step()`, in evaluation and whenever the model's state dict is taken; their gradients are 0 before they are
    clipped. Works with what `accelerator.prepare` returns: mixed precision, DDP, FSDP2, DeepSpeed's ZeRO-1 and ZeRO-2.
    The number of steps is recorded in `model.config.sparsity_config["recovered"]`.

    Args:
        model: a sparse transformers model, prepared or not.
        optimizer: what steps: an optimizer of torch or built like one, prepared or not; or a list of them.
        plan: the plan whose zeros the model has, if it is not in the model's config.

    Yields:
        The masks; after changing weights by other means than the optimizer, call their `apply()`.

    Raises:
        ValueError: a model without zeros, a plan that does not fit it, a quantized, float16 or adapted model, an
            unsupported way to shard it, or something that is not an optimizer.
    """
    inner = unwrapped(model)
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for each in optimizers:
        if not callable(getattr(optimizer_of(each), "register_step_post_hook", None)):
            raise ValueError(f"optimizer is a {type(each).__name__}; a torch optimizer or a list of them is expected")
        check_supported(inner, None, each)
    passed = as_plan(plan)
    fitted = fit_names(passed, inner) if passed else model_plan(inner)
    masks = ZeroMasks(fitting_layers(inner, fitted).weights)
    check_has_zeros(masks, fitted)
    record = TrainingRecord(inner, "own loop", {})
    steps = 0

    def stepped(*_: Any) -> None:
        nonlocal steps
        steps += 1
        masks.apply()
        masks.weights_may_change()

    handles = [optimizer_of(each).register_step_post_hook(stepped) for each in optimizers]
    masks.hold(inner, optimizers[0])
    for each in optimizers:
        masks.clean(each)
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()
        masks.release()
        with torch.no_grad():
            masks.apply()
        record.steps(steps // len(optimizers))
