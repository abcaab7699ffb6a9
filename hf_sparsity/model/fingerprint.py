"""Fingerprints: of weights, of data-independent facts of a model, of library versions."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.shards import is_sharded
from .layers import ModelLayers
from .offload import onload, weight_store


def model_fingerprint(model: PreTrainedModel, model_layers: ModelLayers) -> dict[str, Any]:
    """`{"type", "name", "layers", "weights"}`: names and shapes of the layers, and a sample of their weights, hashed.

    `weights` is None while any layer is offloaded by accelerate, since reading it would load the model; of a streamed
    model they are those of its checkpoint, read once.
    """
    streamed = weight_store(model)
    if streamed is None:
        weights = _sampled(model_layers)
    else:
        key = tuple(model_layers.weights)
        if key not in streamed.fingerprints:
            streamed.reads_ahead = False  # it looks at few pages only
            streamed.fingerprints[key] = _sampled(model_layers, lend=True)
            streamed.reads_ahead = True
        weights = streamed.fingerprints[key]
    return {
        "type": getattr(model.config, "model_type", type(model).__name__),
        "name": getattr(model.config, "_name_or_path", "") or "",
        "layers": shapes_hash(model_layers),
        "weights": weights,
    }


def shapes_hash(model_layers: ModelLayers) -> str:
    """The names and shapes of the layers, hashed."""
    shapes = hashlib.sha256()
    for name, weight in model_layers.weights.items():
        shapes.update(f"{name}{weight.shape}".encode())
    return shapes.hexdigest()


def _sampled(model_layers: ModelLayers, *, lend: bool = False) -> str | None:
    """Up to 64 values of each parameter, hashed; None if some are not in memory and shall not be lent."""
    values = hashlib.sha256()
    sampled: set[str] = set()
    for block in model_layers.blocks:
        with onload(block.module) if lend and block.weights else nullcontext():
            for weight in block.weights.values():
                if weight.stored.device.type == "meta":
                    return None
                if weight.parameter not in sampled:
                    sampled.add(weight.parameter)
                    values.update(sample(weight.stored))
    return values.hexdigest()


def sample(parameter: Tensor) -> bytes:
    """At least 64 values, evenly spread (all, if there are fewer), as float64: for a fingerprint."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float64).numpy().tobytes()


def versions() -> dict[str, str]:
    """Versions that could change a result."""
    found = {}
    for package in ("hf_sparsity", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def weights_fingerprint(model: nn.Module) -> str | None:
    """A hash of a sample of all parameters, buffers left out; None when they are sharded or offloaded."""
    values = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or parameter.is_meta:
            return None
        values.update(name.encode() + sample(parameter))
    return values.hexdigest()
