"""hf_sparsity: large language models with most of their weights gone, for the Hugging Face ecosystem.

The public names are loaded on first use, so that importing the package is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SparsityConfig": "config",
    "Plan": "plan",
    "Report": "plan",
    "make_plan": "hf.sparsify",
    "prune": "hf.sparsify",
    "SparseModel": "hf.model",
    "calibration_batches": "hf.calibration",
    "measure_sparsity": "hf.evaluate",
    "evaluate_text": "hf.evaluate",
    "Allocator": "algorithm",
    "RowAllocator": "algorithm",
    "Pruner": "algorithm",
    "Layer": "algorithm",
}

__all__ = [
    "Allocator",
    "Layer",
    "Plan",
    "Pruner",
    "Report",
    "RowAllocator",
    "SparseModel",
    "SparsityConfig",
    "__version__",
    "calibration_batches",
    "evaluate_text",
    "make_plan",
    "measure_sparsity",
    "prune",
]

if TYPE_CHECKING:
    from .algorithm import Allocator, Layer, Pruner, RowAllocator
    from .config import SparsityConfig
    from .hf.calibration import calibration_batches
    from .hf.evaluate import evaluate_text, measure_sparsity
    from .hf.model import SparseModel
    from .hf.sparsify import make_plan, prune
    from .plan import Plan, Report


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
