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
    "PlanFile": "checkpoint.plan_file",
    "make_plan": "planning.make_plan",
    "prune": "pruning.prune",
    "refit": "pruning.refit",
    "SparseModel": "sparse_model",
    "BitmaskConfig": "checkpoint.quantizer",
    "pack_model": "runtime.packing",
    "unpack_model": "runtime.packing",
    "open_streamed": "checkpoint.streamed",
    "Output": "checkpoint.output",
    "calibration_batches": "calibration.calibration",
    "Source": "calibration.mixture",
    "measure_sparsity": "model.sparsity",
    "evaluate": "evaluation.evaluate",
    "evaluate_text": "evaluation.perplexity",
    "text_windows": "evaluation.perplexity",
    "Text": "evaluation.texts",
    "verify": "publish.verify.verify",
    "certify": "evaluation.certificate",
    "make_card": "publish.card.make_card",
    "push_sparse": "publish.hub",
    "save_sparse": "checkpoint.save",
    "pack": "publish.layouts",
    "unpack": "publish.layouts",
    "SparsityCallback": "recovery.callback",
    "BlockReconstruction": "pruning.reconstruction",
    "DistillationTrainer": "recovery.distillation",
    "Teacher": "recovery.teacher",
    "store_logits": "recovery.stored_logits",
    "Gradual": "recovery.schedules",
    "Elsa": "recovery.schedules",
    "Reallocation": "recovery.schedules",
    "hold_zeros": "recovery.hold",
    "recover": "recovery.recover",
    "MaskedLora": "recovery.methods",
    "FullFineTuning": "recovery.methods",
    "Reconstruction": "recovery.methods",
    "Distillation": "recovery.methods",
    "TrainToSparsity": "recovery.methods",
    "TrainByElsa": "recovery.methods",
    "recipe": "recovery.recipes",
    "sparse_lora": "recovery.lora",
    "load_sparse_lora": "recovery.lora",
    "merge_lora": "recovery.lora",
    "Allocator": "algorithm",
    "RowAllocator": "algorithm",
    "Pruner": "algorithm",
    "Layer": "algorithm",
}

__all__ = [
    "Allocator",
    "BitmaskConfig",
    "BlockReconstruction",
    "Distillation",
    "DistillationTrainer",
    "Elsa",
    "FullFineTuning",
    "Gradual",
    "Layer",
    "MaskedLora",
    "Output",
    "Plan",
    "PlanFile",
    "Pruner",
    "Reallocation",
    "Reconstruction",
    "Report",
    "RowAllocator",
    "Source",
    "SparseModel",
    "SparsityCallback",
    "SparsityConfig",
    "Teacher",
    "Text",
    "TrainByElsa",
    "TrainToSparsity",
    "__version__",
    "calibration_batches",
    "certify",
    "evaluate",
    "evaluate_text",
    "hold_zeros",
    "load_sparse_lora",
    "make_card",
    "make_plan",
    "measure_sparsity",
    "merge_lora",
    "open_streamed",
    "pack",
    "pack_model",
    "prune",
    "push_sparse",
    "recipe",
    "recover",
    "refit",
    "save_sparse",
    "sparse_lora",
    "store_logits",
    "text_windows",
    "unpack",
    "unpack_model",
    "verify",
]

if TYPE_CHECKING:
    from .algorithm import Allocator, Layer, Pruner, RowAllocator
    from .calibration.calibration import calibration_batches
    from .calibration.mixture import Source
    from .checkpoint.output import Output
    from .checkpoint.plan_file import PlanFile
    from .checkpoint.quantizer import BitmaskConfig
    from .checkpoint.save import save_sparse
    from .checkpoint.streamed import open_streamed
    from .config import SparsityConfig
    from .evaluation.certificate import certify
    from .evaluation.evaluate import evaluate
    from .evaluation.perplexity import evaluate_text, text_windows
    from .evaluation.texts import Text
    from .model.sparsity import measure_sparsity
    from .plan import Plan, Report
    from .planning.make_plan import make_plan
    from .pruning.prune import prune
    from .pruning.reconstruction import BlockReconstruction
    from .pruning.refit import refit
    from .publish.card.make_card import make_card
    from .publish.hub import push_sparse
    from .publish.layouts import pack, unpack
    from .publish.verify.verify import verify
    from .recovery.callback import SparsityCallback
    from .recovery.distillation import DistillationTrainer
    from .recovery.hold import hold_zeros
    from .recovery.lora import load_sparse_lora, merge_lora, sparse_lora
    from .recovery.methods import (
        Distillation,
        FullFineTuning,
        MaskedLora,
        Reconstruction,
        TrainByElsa,
        TrainToSparsity,
    )
    from .recovery.recipes import recipe
    from .recovery.recover import recover
    from .recovery.schedules import Elsa, Gradual, Reallocation
    from .recovery.stored_logits import store_logits
    from .recovery.teacher import Teacher
    from .runtime.packing import pack_model, unpack_model
    from .sparse_model import SparseModel


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Registration:
    """An import hook: once transformers can load models, it is told how to load packed folders (`checkpoint/quantizer.py`).

    So `import hf_sparsity` is enough, before or after transformers, and stays instant. Where a file of this package is
    what imports transformers, and is needed for the registration itself, that is done at the next import of anything.
    """

    waiting = False  # for a file of ours to be imported whole

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if self.waiting:
            self.waiting = False
            self.register()
        if name != "transformers.modeling_utils":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self.register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        self.waiting = not _register()
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def _register() -> bool:
    """Returns whether it is done; False where that needs a file of ours that is being imported now."""
    try:
        importlib.import_module(".checkpoint.quantizer", __name__).register(_packed_quantizer)
    except (ImportError, AttributeError) as error:  # never break `import transformers`
        if any(_is_unfinished(module) for name, module in [*sys.modules.items()] if name.startswith(f"{__name__}.")):
            return False
        warnings.warn(f"hf_sparsity cannot load packed folders with this transformers: {error}", stacklevel=2)
    return True


def _is_unfinished(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _packed_quantizer(config: Any, **options: Any) -> Any:
    """Returns what loads a packed folder without unpacking it."""
    return importlib.import_module(".runtime.loading", __name__).PackedQuantizer(config, **options)


if "transformers.modeling_utils" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registration())
