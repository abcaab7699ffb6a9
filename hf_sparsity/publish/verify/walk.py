"""One pass over the weights of a folder, block by block: facts of each layer, and differences from another model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...algorithm import Pattern
from ...model.fingerprint import sample
from ...model.layers import Block, ModelLayers
from ...model.offload import onload
from ...plan import LayerPlan
from ...progress import follow
from .layer_facts import LayerFacts, look


@dataclass
class Measured:
    """The result of `measure`.

    Attributes:
        facts: layer -> its facts.
        samples: parameter -> a few of its values, float64.
        not_finite: parameters with NaN or infinity.
        damaged: block -> why it cannot be read.
        changed: layer -> number of its kept weights that differ from the other model's.
        others: parameters without planned weights that differ from the other model's.
    """

    facts: dict[str, LayerFacts] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def fingerprints(self, model: nn.Module) -> list[str]:
        """Returns the fingerprints that the loaded model can have: in the stored dtype, in bf16 and in fp16."""
        names = [name for name, _ in model.named_parameters()]
        if any(name not in self.samples for name in names):
            return []
        fingerprints = []
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            values = hashlib.sha256()
            for name in names:
                values.update(name.encode() + self.samples[name].to(dtype).to(torch.float64).numpy().tobytes())
            fingerprints.append(values.hexdigest())
        return fingerprints


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    planned: Mapping[str, LayerPlan],
    dense: PreTrainedModel | None = None,
    dense_layout: ModelLayers | None = None,
) -> Measured:
    """Reads every parameter once; of two streamed models one block each is in memory.

    Args:
        model: from `open_streamed`, or in memory.
        model_layers: of its planned layers.
        planned: layers to look at; those that the model lacks are left out.
        dense, dense_layout: a model of the same names and shapes to compare with, in the dtype of `model`.
    """
    seen = Measured()
    twins = {block.name: block for block in dense_layout.blocks} if dense_layout is not None else {}
    for block in follow(model_layers.blocks, "Verifying", "block"):
        twin = twins.get(block.name)
        try:
            with ExitStack() as stack:
                for needed in (block, twin):
                    if needed is not None:
                        stack.enter_context(onload(needed.module))
                _block(seen, block, planned, twin)
        except ValueError as error:  # bytes of a packed folder that are not what was packed
            seen.damaged[block.name] = str(error)
    theirs = dict(_outside(dense)) if dense is not None else None
    for name, parameter in _outside(model):
        _parameter(seen, name, parameter, None if theirs is None else theirs[name])
    return seen


def _block(seen: Measured, block: Block, planned: Mapping[str, LayerPlan], twin: Block | None) -> None:
    """Measures a block that is on its device."""
    theirs = dict(twin.module.named_parameters(prefix=twin.name)) if twin is not None else None
    whole = {weight.parameter for weight in block.weights.values()}
    for name, parameter in block.module.named_parameters(prefix=block.name):
        _parameter(seen, name, parameter, None if theirs is None or name in whole else theirs[name])
    for name, weight in block.weights.items():
        if name not in planned:
            continue
        values = weight.read()
        seen.facts[name] = look(values, Pattern.parse(planned[name].pattern))
        if twin is not None:
            other = twin.weights[name].read().to(values.dtype)
            seen.changed[name] = int(((values != other) & (values != 0)).sum())


def _parameter(seen: Measured, name: str, parameter: Tensor, other: Tensor | None) -> None:
    parameter = parameter.detach()
    seen.samples[name] = torch.frombuffer(bytearray(sample(parameter)), dtype=torch.float64)
    if not torch.isfinite(parameter).all():
        seen.not_finite.append(name)
    if other is not None and not torch.equal(parameter, other.detach().to(parameter.dtype)):
        seen.others.append(name)


def _outside(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters that stay in memory while the blocks come and go."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.device.type != "meta")
