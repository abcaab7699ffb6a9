"""Layers whose statistics hold a given Gram matrix, and the error of their outputs."""

from __future__ import annotations

import torch

from hf_sparsity.algorithm import GRAM, Layer, Pattern
from hf_sparsity.core.stats import InputStats


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
