"""Makes packed folders load through plain transformers: `AutoModelFor….from_pretrained(folder)`.

transformers lets others read their own formats by a *quantizer* that it finds by `quantization_config.quant_method`.
Ours has nothing to quantize: it unpacks, and takes itself away. What comes out is the dense model, bit for bit.

A packed matrix has its ordinary name in the files, so all of transformers' renamings, merges of experts and device
maps apply as they are. An operation put in front of each conversion turns the bytes into the matrix; where a model
has no conversion for a name, we add one. The names to add it for are known from the files.

`register` must have run before a packed folder is loaded. `import hf_sparsity` sees to that.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .bitmask import codec
from .packed_folder import METHOD, check_description, check_headers, check_index, check_tensors, dense_files, is_dense
from .safetensors_index import read_headers
from .system import prefetch
from .transformers_internals import (
    ASKS_FOR_DTYPES,
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    ConversionOps,
    HfQuantizer,
    QuantizationConfigMixin,
    WeightConverter,
    WeightRenaming,
    accept_loading_attributes,
    between,
    call_after_loading,
    conversions_of,
    dot_natural_key,
    rename_source_key,
    set_conversions,
    wanted_dtypes,
)

logger = logging.getLogger(__name__)
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def register(packed: Callable[..., BitmaskQuantizer]) -> None:
    """Makes packed folders loadable in this process; a second call does nothing.

    `packed`: what makes the quantizer that keeps weights packed, see `hf_sparsity/runtime/loading.py`.
    """

    def quantizer(config: BitmaskConfig, **options: Any) -> BitmaskQuantizer:
        if config.dequantize:
            return BitmaskQuantizer(config, **options)
        return packed(config, **options)

    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BitmaskConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = quantizer  # type: ignore[assignment]  # it is only called
    accept_loading_attributes(BitmaskConfig)


class BitmaskConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder, see `packed_folder.py`; or, without it, how such a folder is loaded.

    `dequantize`: True, as when nothing is given, for dense weights; False keeps them packed in memory
    (`hf_sparsity/runtime`): `from_pretrained(folder, quantization_config=BitmaskConfig(dequantize=False))`. `prefer`: with
    False, "memory" keeps every packed weight packed, "speed" unpacks those that dense are multiplied faster.

    Raises:
        ValueError: a config that is none of a packed folder, or an unknown `prefer`.
    """

    def __init__(self, dequantize: bool | None = None, prefer: str = "memory", **described: Any) -> None:
        if prefer not in ("memory", "speed"):
            raise ValueError(f"prefer={prefer!r} is unknown; use 'memory' or 'speed'")
        if not isinstance(dequantize, (bool, type(None))):
            raise ValueError(f"dequantize={dequantize!r}: True (dense weights) or False (packed in memory) is expected")
        self.quant_method = METHOD  # type: ignore[assignment]  # of transformers' own methods there is an enum
        if described or dequantize is None:
            vars(self).update(check_description(described))
        self.dequantize = dequantize is not False  # True tells transformers to drop this config and the quantizer
        self.prefer = prefer

    def get_loading_attributes(self) -> dict[str, Any]:
        """Returns what transformers takes from the config that the user gives, the rest from the folder's."""
        return {"dequantize": self.dequantize, "prefer": self.prefer}


class Unpack(ConversionOps):
    """Turns packed bytes into matrices in the model's dtype; any other tensor passes unchanged.

    `whole`: the operation is the only one of its converter, for one tensor, and names what it returns.
    """

    def __init__(self, whole: bool = False, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.whole = whole
        self.dtypes = dtypes or {}  # of the model's parameters by name, where transformers does not tell
        self.dtype: torch.dtype | None = None  # set for each parameter by `BitmaskQuantizer.get_new_dtype`

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        """`input_dict`: {pattern of names: tensor or list of tensors}, as all of transformers' operations take it."""
        self.dtype = self.dtype or self.dtypes.get(full_layer_name)
        unpacked = {
            pattern: [self._dense(t) for t in (tensors if isinstance(tensors, list) else [tensors])]
            for pattern, tensors in input_dict.items()
        }
        return {full_layer_name: next(iter(unpacked.values()))[0]} if self.whole else unpacked

    def _dense(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:
            return tensor
        return codec.unpack(tensor).to(self.dtype)


class BitmaskQuantizer(HfQuantizer):
    """What transformers calls while it loads a packed folder, in the order of the methods below."""

    requires_calibration = False

    def __init__(self, quantization_config: BitmaskConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("this config describes a packed folder; to prune a model use hf_sparsity.prune")
        self.is_dense = False  # the files are no packed ones, whatever the config says
        self.packed: dict[str, bool] = {}  # {name in the files: whether it is packed}
        self.environment: dict[str, str | None] = {}  # what to restore in it
        self.originals: dict[int, WeightConverter | None] = {}  # id of each converter of ours -> the one it replaced
        self.used: list[Any] | None = None  # the conversions that were used
        self.dtypes: dict[str, torch.dtype] = {}  # of the parameters, for releases that do not ask `get_new_dtype`

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Names the weight files, in the one call that comes before they are looked for.

        Raises:
            ValueError: the model is to be distributed, which packed weights cannot be.
        """
        if getattr(config, "distributed_config", None) is not None:
            raise ValueError(
                "a packed folder cannot be loaded with tensor parallelism or another distributed_config: a slice of a "
                "matrix is not a slice of its packed bytes. Make it dense first: hf_sparsity.unpack(folder, output)"
            )
        folder, described = Path(config._name_or_path), vars(self.quantization_config)
        if self._finds_dense(folder):
            if hasattr(config, "transformers_weights"):
                del config.transformers_weights
            return config
        check_index(folder, described)
        config.transformers_weights = described["weights_file"]
        return config

    update_tp_plan = update_attn_implementation  # its place in older releases

    def _finds_dense(self, folder: Path) -> bool:
        """Returns whether the files of a folder are dense, although its config says that they are packed; notes it."""
        if is_dense(folder, vars(self.quantization_config)):
            logger.warning("%s says that it is packed, but its files are dense: its config was another model's", folder)
            self.is_dense = True
        return self.is_dense

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Returns the device map as it is. Raises ValueError for offload to disk where transformers cannot do it."""
        if not ASKS_FOR_DTYPES and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "with this release of transformers a packed folder cannot be offloaded to disk while it loads: update "
                "transformers, or make the folder dense first: hf_sparsity.unpack(folder, output)"
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        # Only here is the folder known where a class, not an Auto class, is asked to load it.
        if not self.is_dense and checkpoint_files and self._finds_dense(Path(checkpoint_files[0]).parent):
            checkpoint_files[:] = map(str, dense_files(Path(checkpoint_files[0]).parent))
        if self.is_dense:
            return
        files = [Path(os.path.normpath(file)) for file in checkpoint_files or ()]
        check_headers(files, vars(self.quantization_config))
        stored = read_headers(map(str, files))
        prefetch(stored[name] for name in sorted(stored, key=dot_natural_key))  # as transformers takes them
        self.packed = check_tensors(files)
        # Its threads would take all tensors at once. torch looks at the first byte of each with Python's lock held, so all
        # would wait for the disk there; and on a GPU the packed model would be in memory beside the dense one.
        self.environment = {_ONE_BY_ONE: os.environ.get(_ONE_BY_ONE)}
        os.environ[_ONE_BY_ONE] = "1"
        self.model = model
        if not ASKS_FOR_DTYPES:
            self.dtypes = wanted_dtypes(model)

        def check(loading_info: Any) -> None:
            self._restore_environment()
            _check_loaded(model, loading_info, self.packed)
            self.loaded(model)
            self.used = conversions_of(model)  # transformers 5.24 forgets them before it calls us again

        self.undo = call_after_loading(model, check)

    def unpacking(self, whole: bool = False) -> Unpack:
        """Returns the operation that turns bytes into matrices; `whole`: see `Unpack`."""
        return Unpack(whole, self.dtypes)

    def repacking(self) -> list[ConversionOps]:
        """Returns what is done after each conversion of the model's own: nothing."""
        return []

    def loaded(self, model: PreTrainedModel) -> None:
        """Is called when all weights have arrived and been checked, before the model is given to devices."""

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Puts `Unpack` before the model's own conversions, and adds it for packed names that have none."""
        if self.is_dense:
            return weight_conversions
        updated = []
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                ours = between([self.unpacking()], conversion, self.repacking())
                self.originals[id(ours)] = conversion
                conversion = ours
            updated.append(conversion)
        for name in self._unconverted(updated, model or self.model):  # before 5.2x it is not told the model
            ours = WeightConverter([re.escape(name)], [name], [self.unpacking(whole=True)])
            self.originals[id(ours)] = None
            updated.append(ours)
        return updated

    def _unconverted(self, conversions: list[Any], model: PreTrainedModel) -> list[str]:
        """Patterns for the packed names that no converter of the model takes: their last two components."""
        trial = deepcopy(conversions)  # conversions remember whether they were used
        renamings = [c for c in trial if isinstance(c, WeightRenaming)]
        converters = [c for c in trial if isinstance(c, WeightConverter)]
        expected = model.state_dict()
        patterns = set()
        for key in (key for key, packed in self.packed.items() if packed):
            name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if source is None or (name not in expected and key in expected):
                name = name if source is None else key
                parts = name.split(".")
                patterns.add("." + ".".join(parts[-2:]) if len(parts) > 2 else name)
        return sorted(patterns)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Notes the dtype a parameter shall have: its matrix is cast to it, while its packed bytes must not be."""
        self._restore_environment()
        operations = getattr(converter, "operations", ())
        if operations and isinstance(operations[0], Unpack):
            operations[0].dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def _restore_environment(self) -> None:
        """Restores the environment once transformers has read it: at the first tensor, or at the end of loading."""
        while self.environment:
            name, value = self.environment.popitem()
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """Removes all traces of the loading, so that the model saves as any other."""
        if self.is_dense:
            return
        self.undo()
        there = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, dtype in self.dtypes.items():
            tensor = there.get(name)  # None for a weight that stays packed
            if tensor is not None and tensor.dtype != dtype and tensor.device.type != "meta":
                tensor.data = tensor.data.to(dtype)
        used = [self.originals.get(id(c), c) for c in self.used or ()]
        set_conversions(model, [c for c in used if c is not None])
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights

    def is_serializable(self) -> bool:
        """Returns True: the loaded model is an ordinary one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the loaded model is an ordinary one."""
        return True


def _check_loaded(model: PreTrainedModel, loading_info: Any, stored: dict[str, bool]) -> None:
    """Raises ValueError where transformers would warn and go on with random weights for damaged or missing ones.

    A model of the class that was saved must be complete. Another class may have a new head, but a weight whose like
    in another block is in the files cannot be new.
    """
    if loading_info.conversion_errors:
        name, text = next(iter(loading_info.conversion_errors.items()))
        count = len(loading_info.conversion_errors)
        loading_info.conversion_errors = {}  # else transformers raises another error over this one
        reason = next((line for line in reversed(text.splitlines()) if line.startswith("ValueError")), text[-300:])
        raise ValueError(f"packed folder: {count} weights could not be unpacked, such as {name}: {reason}")
    # Only where a name took another way than `_unconverted` foresaw; `ignore_mismatched_sizes` would fill it in.
    astray = {name for name, stored, wanted in loading_info.mismatched_keys if len(stored) == 1 < len(wanted)}
    missing = set(loading_info.missing_keys) | astray
    if type(model).__name__ not in (model.config.architectures or ()):
        kinds = {_kind(name, model) for name in stored}
        missing = {name for name in missing if re.search(r"\d", name) and _kind(name, model) in kinds}
    if missing:
        raise ValueError(
            f"packed folder: {len(missing)} weights of {type(model).__name__} are not in its files, such as "
            f"{sorted(missing)[0]}; the config or the files are damaged"
        )


def _kind(name: str, model: PreTrainedModel) -> str:
    """Returns a parameter's name without the numbers of blocks and experts, and without the base model's prefix."""
    return re.sub(r"\.\d+(?=\.)", ".#", name.removeprefix(model.base_model_prefix + "."))
