"""Fingerprints of a model: its layers, its weights, and the versions of the libraries that made them."""

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
    """Returns `{"type", "name", "layers", "weights"}`, what tells one model from another.

    `layers` is a hash of the names and shapes of the layers, `weights` of a sample of their weights: None while any layer is
    offloaded by accelerate, since reading it would load the model. A streamed model's checkpoint is read for it, once.
    """
    store = weight_store(model)
    if store is None:
        weights = _weights_hash(model_layers)
    else:
        key = tuple(model_layers.weights)
        if key not in store.fingerprints:
            store.reads_ahead = False  # few pages of each block are looked at
            store.fingerprints[key] = _weights_hash(model_layers, lend=True)
            store.reads_ahead = True
        weights = store.fingerprints[key]
    return {
        "type": getattr(model.config, "model_type", type(model).__name__),
        "name": getattr(model.config, "_name_or_path", "") or "",
        "layers": shapes_hash(model_layers),
        "weights": weights,
    }


def shapes_hash(model_layers: ModelLayers) -> str:
    """Returns a SHA-256 over the names and shapes of the layers."""
    shapes = hashlib.sha256()
    for name, weight in model_layers.weights.items():
        shapes.update(f"{name}{weight.shape}".encode())
    return shapes.hexdigest()


def _weights_hash(model_layers: ModelLayers, *, lend: bool = False) -> str | None:
    """A SHA-256 over a sample of each parameter; None if some are not in memory and `lend` does not allow to load them."""
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
    """Returns at least 64 values of a tensor as float64 bytes, evenly spread; all of them where there are fewer."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float64).numpy().tobytes()


def versions() -> dict[str, str]:
    """Returns the versions of the packages that could change a result, "unknown" for one without metadata."""
    installed = {}
    for package in ("hf_sparsity", "torch", "transformers"):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "unknown"
    return installed


def weights_fingerprint(model: nn.Module) -> str | None:
    """Returns a SHA-256 over a sample of each parameter, buffers left out; None when some are sharded or offloaded."""
    values = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or parameter.is_meta:
            return None
        values.update(name.encode() + sample(parameter))
    return values.hexdigest()
