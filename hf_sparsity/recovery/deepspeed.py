"""What DeepSpeed does with parameters: its ZeRO stage, and the float32 copies it trains instead of them.

ZeRO-1 and ZeRO-2 leave every parameter whole and train a flat float32 copy that is split among the processes; each
parameter knows its part (`_hp_mapping`, which DeepSpeed's own `safe_get_full_fp32_param` reads). ZeRO-3 splits the
parameters themselves, in a form that no mask fits. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

UNKNOWN = "unknown"  # the stage of a DeepSpeed configuration that cannot be read


def optimizer_of(wrapped: Any) -> Any:
    """Returns the optimizer inside accelerate's, DeepSpeed's or other wrappers."""
    seen: set[int] = set()
    while id(wrapped) not in seen and getattr(wrapped, "optimizer", None) is not None:
        seen.add(id(wrapped))
        wrapped = wrapped.optimizer
    return wrapped


def uses_deepspeed(optimizer: Any) -> bool:
    """Returns whether an optimizer, or one that it wraps, is DeepSpeed's."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(optimizer).__mro__):
            return True
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
    return False


def master_parts(parameter: nn.Parameter) -> Iterator[tuple[Tensor, slice]]:
    """Yields DeepSpeed's float32 copy and moments of a parameter on this process, each `[n]`, with its place.

    The place is a slice of the flattened parameter. Nothing is yielded without DeepSpeed.
    """
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return
    address = mapping.lp_fragment_address
    place = slice(address.start, address.start + address.numel)
    moments = (getattr(mapping, "optim_fragment", None) or {}).values()
    for part in (mapping.hp_fragment, *moments):
        if isinstance(part, Tensor) and part.numel() == address.numel and part.is_floating_point():
            yield part, place


def check_stage(model: nn.Module, args: Any = None, optimizer: Any = None) -> None:
    """Raises ValueError for ZeRO-3, however it was chosen: by arguments, accelerate, or a DeepSpeed engine.

    Args:
        model: looked at for parameters that ZeRO-3 has split.
        args: `TrainingArguments`, whose `deepspeed` and `deepspeed_plugin` name the stage.
        optimizer: the prepared one, which may be DeepSpeed's.
    """
    stage: Any = 3 if any(hasattr(parameter, "ds_id") for parameter in model.parameters()) else None
    for plugin in (getattr(args, "deepspeed_plugin", None), _accelerate_plugin()):
        stage = stage if plugin is None or stage is not None else _plugin_stage(plugin)
    if stage is None and getattr(args, "deepspeed", None):
        stage = _config_stage(args.deepspeed)
    if stage is None:
        return
    if stage not in (0, 1, 2):
        raise ValueError(
            f"DeepSpeed is used with {f'ZeRO stage {stage}' if stage != UNKNOWN else 'a ZeRO stage that cannot be read'}: "
            "ZeRO-3 splits the parameters themselves, so that masks do not fit them. Use stage 1 or 2, DDP or FSDP2"
        )


def _accelerate_plugin() -> Any:
    """Returns the DeepSpeed plugin of accelerate's current state, such as `accelerate launch --use_deepspeed` makes."""
    from accelerate.state import AcceleratorState, is_initialized

    return getattr(AcceleratorState(), "deepspeed_plugin", None) if is_initialized() else None


def _plugin_stage(plugin: Any) -> Any:
    stage = getattr(plugin, "zero_stage", None)
    return _config_stage(getattr(plugin, "deepspeed_config", None)) if stage is None else stage


def _config_stage(config: Any) -> Any:
    """Returns the ZeRO stage of a DeepSpeed config, given as dict or as JSON file; `UNKNOWN` if it cannot be read."""
    if isinstance(config, (str, os.PathLike)):
        try:
            with open(config, encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError):
            return UNKNOWN
    if not isinstance(config, Mapping):
        return UNKNOWN
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    return UNKNOWN if stage is None else stage
