"""What a sparse model holds already: its plan, its zeros layer by layer, and the pruner that takes them as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Cells, Layer, Pattern, Pruner
from ..config import SparsityConfig
from ..model.fingerprint import model_fingerprint, versions
from ..model.layers import Block, ModelLayers, find_layers
from ..model.offload import onload
from ..model.sparsity import model_plan
from ..plan import LARGEST_DEVIATION, LayerPlan, Plan

GROUPS = (4, 8, 16, 32)  # of N:M patterns that are recognised in zeros without a plan


@dataclass(frozen=True)
class Given(Pruner):
    """Gives each layer the weights, or the mask, that it has elsewhere.

    `weights`: hash of them, so that a run is not gone on with others. `source`: returns the weights of a layer `[out, in]`,
    zero where pruned, or its mask, bool, True = kept, by the layer's name.
    """

    weights: str
    source: Callable[[str], Tensor] = field(repr=False, compare=False)

    name = "given"
    updates_survivors = True
    takes_zeros = True
    without_inputs = "left as it was given"

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"name": "given", "weights": hash}`."""
        return {"name": self.name, "weights": self.weights}

    def scores(self, layer: Layer) -> Tensor:
        """Raises ValueError: there are no masks but the given one."""
        raise ValueError(f"{layer.name}: its zeros are given, so there are no scores to choose others by")

    def compared_within(self, layer: Layer) -> Cells | None:
        """Returns None, since no scores are compared."""
        return None

    def prune(self, layer: Layer) -> Tensor:
        """The given weight `[out, in]`, in the layer's dtype; of a mask, the layer's own where it is True."""
        given = self.source(layer.name).to(layer.weight.device)
        if given.dtype == torch.bool:
            return layer.weight.masked_fill(~given, 0)
        return given.to(layer.weight.dtype)


class SparseWeights:
    """Reads the weights of a model by their layers' names; of a streamed one a block is in memory at a time."""

    def __init__(self, model_layers: ModelLayers):
        self._blocks = {name: block for block in model_layers.blocks for name in block.weights}
        self._here: Block | None = None
        self._read: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Returns a copy of a layer's weights `[out, in]`."""
        block = self._blocks[name]
        if block is not self._here:
            self._read.clear()
            with onload(block.module):
                self._read = {name: weight.read().clone() for name, weight in block.weights.items()}
            self._here = block
        return self._read[name]


def plan_of(sparse: PreTrainedModel, model: PreTrainedModel, refine: str | None) -> tuple[Plan, ModelLayers]:
    """Returns the plan by which a sparse model is refitted, and its layers.

    It is the model's own plan with `refit`; where the model has none, one is made from its zeros, whose pruner is None.

    Raises:
        ValueError: a model without zeros, that was trained since it was pruned, or that differs from the dense one in more
            than its planned weights.
    """
    stored = getattr(sparse.config, "sparsity_config", None)
    if isinstance(stored, Mapping) and isinstance(trained := stored.get("recovered"), Mapping):
        raise ValueError(
            f"the sparse model was trained after it was pruned (method {trained.get('method')!r}), which a refit towards "
            "the dense weights would undo: refit the model that was trained, and train it again"
        )
    known = model_plan(sparse)
    options = known.config if known else {}
    chosen = tuple(options.get("ignore") or ()), tuple(options.get("include") or ())
    theirs, ours = find_layers(sparse, *chosen), find_layers(model, *chosen)
    _check_same(sparse, theirs, model, ours)
    zeros, patterns = _look(theirs, ours)
    sizes = {name: weight.size for name, weight in theirs.weights.items()}
    found = plan_of_zeros(zeros, sizes, patterns, refine)
    print_of = model_fingerprint(model, ours)
    if known is None:
        return replace(found, model=print_of), theirs
    for name, layer in known.layers.items():
        if name not in zeros:
            raise ValueError(f"the sparse model's plan has a layer {name}, which it does not have")
        width = theirs.weights[name].shape[1]
        if zeros[name] / sizes[name] < layer.sparsity - LARGEST_DEVIATION - 1 / width:
            raise ValueError(
                f"{name} of the sparse model has a sparsity of {zeros[name] / sizes[name]:.4f} where its plan says "
                f"{layer.sparsity:.4f}: was it trained or merged since? hf-sparsity verify tells more"
            )
    config = {key: value for key, value in known.config.items() if key not in ("refit", "refine")}
    return replace(known, config=config | _options(refine), model=print_of), theirs


def plan_of_zeros(
    zeros: Mapping[str, int], sizes: Mapping[str, int], patterns: Mapping[str, Pattern], refine: str | None
) -> Plan:
    """Returns a plan of what is there already, with `refit` and without a pruner; raises ValueError where no layer has zeros."""
    if not any(zeros.values()):
        raise ValueError("the sparse model has no zeros: prune it first (hf_sparsity.prune), or give another")
    layers = {}
    for name, size in sizes.items():
        implied = patterns[name].sparsity
        layers[name] = LayerPlan(zeros[name] / size if implied is None else implied, size, str(patterns[name]))
    total = sum(sizes.values())
    sparsity = math.fsum(layer.sparsity * layer.size for layer in layers.values()) / total
    common = {layer.pattern for layer in layers.values()}
    pattern = common.pop() if len(common) == 1 else "unstructured"
    config = SparsityConfig(sparsity, pattern=pattern).to_dict()
    del config["allocator"]
    return Plan(config=config | {"pruner": None} | _options(refine), layers=layers, versions=versions())


def pattern_of(mask: Tensor) -> Pattern:
    """Returns the N:M pattern that a mask (bool `[out, in]`, True = kept) obeys and fills, the one with the smallest M."""
    for group in GROUPS:
        if mask.shape[1] % group == 0:
            kept = int(mask.unflatten(1, (-1, group)).sum(2).max())
            if 0 < kept < group and float(mask.float().mean()) > kept / group - LARGEST_DEVIATION:
                return Pattern(kept, group)
    return Pattern()


def _options(refine: str | None) -> dict[str, Any]:
    return {"refit": True} | ({"refine": refine} if refine else {})


def _check_same(sparse: PreTrainedModel, theirs: ModelLayers, model: PreTrainedModel, ours: ModelLayers) -> None:
    """Raises ValueError unless both models have the same layers and equal parameters outside of the blocks."""
    shapes = [{name: weight.shape for name, weight in layers.weights.items()} for layers in (theirs, ours)]
    if different := sorted(set(shapes[0].items()) ^ set(shapes[1].items())):
        raise ValueError(
            f"the sparse model has other layers than the dense one: {len(different)} differ, such as {different[0][0]}"
        )
    dense = dict(model.named_parameters())
    inside = tuple(f"{block.name}." for block in theirs.blocks)
    for name, parameter in sparse.named_parameters():
        other = dense.get(name)
        if other is not None and not (name.startswith(inside) or parameter.is_meta or other.is_meta):
            _check_equal(name, parameter, other)


def _check_equal(name: str, parameter: Tensor, dense: Tensor) -> None:
    narrow = parameter.dtype if parameter.dtype.itemsize <= dense.dtype.itemsize else dense.dtype
    if not torch.equal(parameter.detach().to(narrow).cpu(), dense.detach().to(narrow).cpu()):
        raise ValueError(
            f"{name} of the sparse model is not the dense model's, although nothing is pruned there: the sparse model was "
            "trained, or is of another dense model. Give the model that it was pruned from"
        )


def _look(theirs: ModelLayers, ours: ModelLayers) -> tuple[dict[str, int], dict[str, Pattern]]:
    """The zeros and the pattern of each layer; `ValueError` where a block's other parameters differ from the dense ones."""
    zeros: dict[str, int] = {}
    patterns: dict[str, Pattern] = {}
    for block, twin in zip(theirs.blocks, ours.blocks, strict=True):
        planned = {weight.parameter for weight in block.weights.values()}
        with onload(block.module), onload(twin.module):
            dense = dict(twin.module.named_parameters(prefix=twin.name))
            for name, parameter in block.module.named_parameters(prefix=block.name):
                if name not in planned:
                    _check_equal(name, parameter, dense[name])
            for name, weight in block.weights.items():
                mask = weight.read() != 0
                zeros[name] = mask.numel() - int(mask.sum())
                patterns[name] = pattern_of(mask)
    return zeros, patterns
