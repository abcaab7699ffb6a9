"""The names of transformers used here that are no documented interface, in one file.

`conversion.py`, `quantizer.py` and `output.py` take them from here; nothing else in the package uses them. Each was
read and run in the oldest and the newest release that `pyproject.toml` allows (`make test-oldest`, `make test-newest`).
Where the releases differ, a function hides the difference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        ConversionOps,
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.dynamic_module_utils import custom_object_save
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.quantizers import auto
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"transformers {transformers.__version__} lacks what hf_sparsity reads and writes checkpoints with ({error}). "
        "Install a release that this version of hf_sparsity was tested with: pip install 'transformers>=5.10,<5.25'"
    ) from error

__all__ = [
    "ASKS_FOR_DTYPES",
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "ConversionOps",
    "HfQuantizer",
    "LoadStateDictConfig",
    "PrefixChange",
    "QuantizationConfigMixin",
    "WeightConverter",
    "WeightRenaming",
    "convert_and_load_state_dict_in_model",
    "custom_object_save",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
    "revert_weight_conversion",
]

_CONVERSIONS = "_weight_conversions"  # set by loading, read by saving
_LOADING_ATTRIBUTES = "LOADING_ATTRIBUTES_CONFIG_TYPES"  # whose configs may be given at loading, too
_AFTER_LOADING = "_adjust_missing_and_unexpected_keys"

# Before 5.17 or so a quantizer is not asked for the dtype of each tensor; then nothing but plain names is cast.
ASKS_FOR_DTYPES = hasattr(HfQuantizer, "get_new_dtype")


def conversions_of(model: PreTrainedModel) -> list[Any] | None:
    """Returns the conversions by which a model was loaded, as saving will revert them; None where loading left none."""
    return vars(model).get(_CONVERSIONS)


def set_conversions(model: PreTrainedModel, conversions: list[Any] | None) -> None:
    """Makes these the conversions that saving reverts; None: as for a model that was never loaded."""
    if conversions is None:
        vars(model).pop(_CONVERSIONS, None)
    else:
        vars(model)[_CONVERSIONS] = conversions


def between(before: list[ConversionOps], conversion: WeightConverter, after: list[ConversionOps]) -> WeightConverter:
    """Returns a new conversion that does some operations before, and some after those of another."""
    operations = [*before, *conversion.operations, *after]
    if not hasattr(conversion, "copy"):  # older releases
        copied = copy.deepcopy(conversion)
        copied.operations = operations
        return copied
    sources, targets = conversion._original_source_patterns.copy(), conversion._original_target_patterns.copy()
    return conversion.copy(sources, targets, operations=operations)


def accept_loading_attributes(config: type[QuantizationConfigMixin]) -> None:
    """Lets `from_pretrained(quantization_config=...)` change how a folder with a config of this type is loaded."""
    kinds = getattr(auto, _LOADING_ATTRIBUTES, None)
    if kinds is not None and config not in kinds:
        setattr(auto, _LOADING_ATTRIBUTES, (*kinds, config))


def call_after_loading(model: PreTrainedModel, check: Callable[[Any], None]) -> Callable[[], None]:
    """Has `check(loading_info)` called when all weights of a model are loaded, missing ones filled in.

    This is the only place that sees what transformers would fill with random numbers. Returns what undoes it.
    """
    adjust = getattr(model, _AFTER_LOADING)

    def adjust_and_check(loading_info: Any) -> None:
        adjust(loading_info)
        check(loading_info)

    vars(model)[_AFTER_LOADING] = adjust_and_check
    return lambda: vars(model).pop(_AFTER_LOADING, None)


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns patterns of parameter names -> the dtype these have where it is not `dtype`."""
    return model._get_dtype_plan(dtype)


def wanted_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Returns the dtype that loading gives each parameter and buffer; before loading, when none has its values yet."""
    plan = {re.compile(name.replace("*", ".*")): dtype for name, dtype in dtype_plan(model, model.dtype).items()}
    return {
        name: next((dtype for pattern, dtype in plan.items() if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
