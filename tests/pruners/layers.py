"""Layers whose statistics hold a given Gram matrix, the error of their outputs, and the authors' values for two such layers."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from hf_sparsity.algorithm import GRAM, Layer, Pattern
from hf_sparsity.core.stats import InputStats
from tests.conftest import GOLDENS

NAMES = {"q": "model.layers.0.self_attn.q_proj", "o": "model.layers.0.self_attn.o_proj"}


def golden():
    """What the authors' ALPS and others made of the layers `NAMES`, and `weight.<name>`, their dense weights."""
    tensors = load_file(GOLDENS / "llama-tiny/alps_layer0.safetensors")
    weights = load_file(GOLDENS / "models/llama-tiny/model.safetensors")
    return tensors | {f"weight.{short}": weights[f"{name}.weight"].float() for short, name in NAMES.items()}


def with_gram(weight, gram, sparsity, pattern="unstructured", **more):
    """A layer whose statistics hold this Gram matrix."""
    stats = InputStats(frozenset({GRAM}))
    values, vectors = torch.linalg.eigh(gram.double())
    stats.add((vectors * values.clamp(min=0).sqrt()).T.float(), sequences=4)  # tokens that have it
    stats.gram.copy_(gram)
    return Layer("x", weight, stats=stats, sparsity=sparsity, pattern=Pattern.parse(pattern), **more)


def error(layer, new):
    """The relative squared error of the outputs."""
    return layer.stats.energy(layer.weight - new) / layer.stats.energy(layer.weight)
