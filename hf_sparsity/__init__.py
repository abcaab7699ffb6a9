"""hf_sparsity: large language models with most of their weights gone, for the Hugging Face ecosystem.

The public names are loaded on first use, so that importing the package is instant.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SparsityConfig": "config",
    "Plan": "plan",
    "Report": "plan",
    "PlanFile": "hf.plan_file",
    "make_plan": "hf.sparsify",
    "prune": "hf.sparsify",
    "SparseModel": "hf.model",
    "calibration_batches": "hf.calibration",
    "Source": "hf.mixture",
    "measure_sparsity": "hf.evaluate",
    "evaluate": "hf.evaluation",
    "evaluate_text": "hf.evaluate",
    "verify": "hf.verify",
    "certify": "hf.certificate",
    "make_card": "hf.card",
    "push_sparse": "hf.hub",
    "save_sparse": "hf.pack",
    "pack": "hf.pack",
    "unpack": "hf.pack",
    "SparsityCallback": "hf.callback",
    "BlockReconstruction": "hf.reconstruct",
    "DistillationTrainer": "hf.distill",
    "recover": "hf.recover",
    "sparse_lora": "hf.lora",
    "load_sparse_lora": "hf.lora",
    "merge_lora": "hf.lora",
    "Allocator": "algorithm",
    "RowAllocator": "algorithm",
    "Pruner": "algorithm",
    "Layer": "algorithm",
}

__all__ = [
    "Allocator",
    "BlockReconstruction",
    "DistillationTrainer",
    "Layer",
    "Plan",
    "PlanFile",
    "Pruner",
    "Report",
    "RowAllocator",
    "Source",
    "SparseModel",
    "SparsityCallback",
    "SparsityConfig",
    "__version__",
    "calibration_batches",
    "certify",
    "evaluate",
    "evaluate_text",
    "load_sparse_lora",
    "make_card",
    "make_plan",
    "measure_sparsity",
    "merge_lora",
    "pack",
    "prune",
    "push_sparse",
    "recover",
    "save_sparse",
    "sparse_lora",
    "unpack",
    "verify",
]

if TYPE_CHECKING:
    from .algorithm import Allocator, Layer, Pruner, RowAllocator
    from .config import SparsityConfig
    from .hf.calibration import calibration_batches
    from .hf.callback import SparsityCallback
    from .hf.card import make_card
    from .hf.certificate import certify
    from .hf.distill import DistillationTrainer
    from .hf.evaluate import evaluate_text, measure_sparsity
    from .hf.evaluation import evaluate
    from .hf.hub import push_sparse
    from .hf.lora import load_sparse_lora, merge_lora, sparse_lora
    from .hf.mixture import Source
    from .hf.model import SparseModel
    from .hf.pack import pack, save_sparse, unpack
    from .hf.plan_file import PlanFile
    from .hf.reconstruct import BlockReconstruction
    from .hf.recover import recover
    from .hf.sparsify import make_plan, prune
    from .hf.verify import verify
    from .plan import Plan, Report


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Registration:
    """An import hook: once transformers can load models, it is told how to load packed folders (`hf/bitmask.py`).

    So `import hf_sparsity` is enough, before or after transformers, and stays instant.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers.modeling_utils":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module(".hf.bitmask", __name__).register()
    except ImportError as error:  # never break `import transformers`
        warnings.warn(f"hf_sparsity cannot load packed folders with this transformers: {error}", stacklevel=2)


if "transformers.modeling_utils" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registration())
