"""What a model's config says that it is, and how that is renewed when the model is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

QUANT_METHOD = "hf_sparsity"  # in the config of packed folders, see `checkpoint/quantizer.py`


def renew_identity(model: Any, folder: str | os.PathLike[str] | None) -> None:
    """Makes a changed model's config stop saying that it is another model.

    `config._name_or_path` is where others load "this model" from, such as TRL the reference of a DPO run: it becomes the
    folder that the changed model was written to, or empty. `model.name_or_path`, by which its tokenizer is found, stays.
    A `quantization_config` of packed folders, left in a config that was taken from one, is removed: the model in memory
    is not packed.
    """
    model.config._name_or_path = "" if folder is None else str(folder)
    forget_packing(model.config)


def forget_packing(config: Any) -> None:
    """Removes from the config of a model in memory what describes packed files."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    if method == QUANT_METHOD:
        del config.quantization_config
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
