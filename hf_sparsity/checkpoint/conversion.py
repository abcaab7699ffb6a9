"""From names, layouts and dtypes of a checkpoint to those of the model, by transformers' own converter.

The functions of transformers used here are not part of its documented interface; see `transformers_internals.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .safetensors_index import Stored, opened
from .transformers_internals import (
    LoadStateDictConfig,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    conversions_of,
    convert_and_load_state_dict_in_model,
    dtype_plan,
    get_model_conversion_mapping,
    rename_source_key,
    revert_weight_conversion,
    set_conversions,
)


def slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Returns every name of every parameter -> (the module that has it, its name there)."""
    return {
        f"{path}.{attribute}" if path else attribute: (module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    }


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of the same class and config whose parameters take no memory."""
    with init_empty_weights(include_buffers=False):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    twin.config.dtype = torch.float32
    return twin


def read_parameters(
    model: PreTrainedModel, stored: Mapping[str, Stored], keys: Iterable[str], device: torch.device
) -> dict[str, Tensor]:
    """Returns the parameters that some tensors of a checkpoint make, by all their names in the model.

    The model itself stays as it was.
    """
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    unchanged = {id(parameter) for _, parameters, _ in before for parameter in parameters.values()}
    try:
        with opened(stored, keys) as tensors:
            convert(model, tensors, device)
        after = {name: module._parameters[attribute] for name, (module, attribute) in slots(model).items()}
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
    return {name: p.detach() for name, p in after.items() if p is not None and id(p) not in unchanged}


def rehearse(model: PreTrainedModel, stored: Mapping[str, Stored]) -> set[str]:
    """Loads the whole checkpoint without its values; returns the names in the model that it does not provide.

    Afterwards each parameter has the dtype it will have, and saving gives the names that the checkpoint has.

    Raises:
        ValueError: tensors of another shape than the config says, or that cannot be converted.
    """
    empty = {key: torch.empty(tensor.shape, device="meta") for key, tensor in stored.items()}
    info, used = convert(model, empty, torch.device("meta"))
    if info.mismatched_keys:
        key, shape, expected = sorted(info.mismatched_keys)[0]
        raise ValueError(
            f"{len(info.mismatched_keys)} tensors of the checkpoint have another shape than the config says: "
            f"{key} is {list(shape)}, not {list(expected)}"
        )
    if info.conversion_errors:
        raise ValueError(f"the checkpoint cannot be converted: {some(info.conversion_errors)}")
    set_conversions(model, _undoing_prefix(model, stored, used))
    return set(info.missing_keys)


def convert(model: PreTrainedModel, tensors: dict[str, Any], device: torch.device) -> tuple[Any, list[Any]]:
    """Runs the converter on some tensors of a checkpoint, which sets parameters and buffers of the model.

    Returns:
        (what the converter reports, the conversions that were used).
    """
    before = conversions_of(model)
    dtype: Any = model.config.dtype
    conversions: Any = get_model_conversion_mapping(model)  # they carry state: new ones for each run
    config = LoadStateDictConfig(
        device_map={"": device}, dtype=dtype, dtype_plan=dtype_plan(model, dtype), weight_mapping=conversions
    )
    hook = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs))
    try:
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config, None)
        return info, conversions_of(model) or []
    finally:
        transformers_logging.set_tqdm_hook(hook)
        set_conversions(model, before)  # those of the whole checkpoint


def targets(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Returns name in the checkpoint -> name in the model; the first of several; names without a use are left out."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    expected = model.state_dict()
    result: dict[str, str] = {}
    for key in keys:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and key in expected:  # as the converter does
            target, _ = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if target in expected:
            result[key] = target
    return result


def _undoing_prefix(model: PreTrainedModel, keys: Mapping[str, Any], used: list[Any]) -> list[Any]:
    """Returns the conversions `used`, and one more where the names in the checkpoint have another prefix.

    transformers' converter adds or removes the prefix of the base model silently, and would save under the names of
    the model.
    """
    prefix, state = model.base_model_prefix, model.state_dict()

    def agreeing(conversions: list[Any]) -> int:
        set_conversions(model, conversions)
        return len(keys & revert_weight_conversion(model, state).keys())

    options = [used]
    if any(key not in state and f"{prefix}.{key}" in state for key in keys):
        options.append([*used, PrefixChange(prefix_to_add=prefix)])
    if any(key not in state and key.removeprefix(f"{prefix}.") in state for key in keys):
        options.append([*used, PrefixChange(prefix_to_remove=prefix)])
    return max(options, key=agreeing) if len(options) > 1 else used


def some(names: Iterable[str]) -> str:
    """Returns the first few names as text, for a message."""
    first = sorted(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
