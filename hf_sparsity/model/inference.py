"""A model in evaluation mode, and what a batch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# A batch as the model's forward takes it. Text batches have at least `input_ids` [sequences, tokens].
Batch = Mapping[str, Any]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside, the previous modes after."""
    before: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and experts computed one by one so that each one's inputs can be seen; restored after."""
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    with evaluating(model):
        try:
            if experts:
                model.set_experts_implementation("eager")
            yield
        finally:
            if experts:
                model.set_experts_implementation(experts)
