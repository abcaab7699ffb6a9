"""Packed folders loaded without unpacking: what transformers calls for `BitmaskConfig(dequantize=False)`.

The weights arrive as in `checkpoint/quantizer.py`, but what is a layer's stays a packed string, copied into memory of its
own and checked. When all have arrived each takes the place of its layer. A fused weight that the files hold in parts, such
as one matrix for each expert, is put together dense and packed again, one at a time.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.bitmask import codec
from ..checkpoint.packed_folder import groups_of, is_packed
from ..checkpoint.quantizer import BitmaskConfig, BitmaskQuantizer, Unpack
from ..checkpoint.transformers_internals import ConversionOps
from ..model.layers import find_layers
from ..model.sparsity import model_plan
from .choose import show_speeds, unpack_slow_layers
from .install import in_rows, install, pack_rows
from .rows import with_room
from .state import checkpoint_state, mark_packed

logger = logging.getLogger(__name__)


def packed_quantizer(prefer: str = "memory") -> BitmaskQuantizer:
    """Returns the quantizer that a model packed in memory has. Raises ValueError for an unknown `prefer`."""
    return PackedQuantizer(BitmaskConfig(dequantize=False, prefer=prefer))


class _Shared(dict[str, bool]):
    """{name of a parameter that stays packed: whether the model stores it as `[in, out]`}, not copied with what has it."""

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


class Keep(Unpack):
    """Leaves packed bytes of layers as they are, in memory of their own and checked; unpacks all others."""

    def __init__(self, layers: _Shared, whole: bool = False, dtypes: Any = None) -> None:
        super().__init__(whole, dtypes)
        self.layers = layers

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **more: Any) -> dict[str, Any]:  # type: ignore[override]
        """`input_dict`: {pattern of names: tensor or list of tensors}, as all of transformers' operations take it."""
        value = next(iter(input_dict.values()))
        tensor = value[0] if isinstance(value, list) else value
        if full_layer_name not in self.layers or not is_packed(tensor):
            return super().convert(input_dict, full_layer_name=full_layer_name, **more)
        own = tensor.clone() if tensor.device.type != "cpu" else _copied(tensor)
        codec.check(own)
        return {full_layer_name: own}


class Repack(ConversionOps):
    """Packs what a conversion of several tensors has made, where it is the weight of a layer."""

    def __init__(self, layers: _Shared, groups: list[tuple[int, int]]) -> None:
        self.layers, self.groups = layers, groups

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, **more: Any) -> dict[str, Any]:  # type: ignore[override]
        """`input_dict`: {pattern of names: tensor}, as all of transformers' operations take it."""
        found: dict[str, Any] = {}
        for pattern, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            before, _, after = full_layer_name.replace("*.", "0.").partition(pattern)
            transposed = self.layers.get(f"{before}{pattern}{after}")
            packed = None if transposed is None else pack_rows(tensor.contiguous(), transposed, self.groups)
            found[pattern] = value if packed is None else packed
        return found


def _copied(packed: Tensor) -> Tensor:
    """The string in memory of its own, with room behind it."""
    return with_room(torch.empty(len(packed) + 64, dtype=torch.uint8)[: len(packed)].copy_(packed))


class PackedQuantizer(BitmaskQuantizer):
    """Loads a packed folder into a model with packed modules."""

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Returns the device map as it is. Raises ValueError for one that offloads."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("packed weights cannot be offloaded to disk; load the folder without dequantize=False")
        return super().update_device_map(device_map)

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **options: Any) -> None:
        model.is_quantized = False  # for a moment: the layers are those of the model as it will be unpacked
        try:
            weights = find_layers(model).weights.values()
        finally:
            model.is_quantized = True
        self.layers = _Shared({weight.parameter: weight.transposed for weight in weights})
        self.groups = groups_of(model_plan(model))
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        super()._process_model_before_weight_loading(model, *arguments, **options)

    def unpacking(self, whole: bool = False) -> Unpack:
        """Returns the operation that is put before each conversion."""
        return Keep(self.layers, True, self.dtypes) if whole else Unpack(dtypes=self.dtypes)

    def repacking(self) -> list[ConversionOps]:
        """Returns the operations that are put after each conversion of the model's own."""
        return [Repack(self.layers, self.groups)]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Returns True where a string may stand for a matrix of another shape; `loaded` checks the shapes."""
        return param_name in self.layers

    def loaded(self, model: PreTrainedModel) -> None:
        """Puts the packed weights in the place of their layers.

        Raises:
            ValueError: a weight of another shape than the config says.
        """
        for name, parameter in list(model.named_parameters()):
            if name not in self.layers:
                continue
            packed = is_packed(parameter)
            shape = torch.Size(codec.read_header(parameter).shape) if packed else parameter.shape
            if shape != self.shapes[name]:
                raise ValueError(
                    f"packed folder: size mismatch for {name}: {tuple(shape)}, not {tuple(self.shapes[name])}"
                )
            if packed:
                dtype = self.dtypes.get(name, self.wanted[name])
                install(model, name, in_rows(parameter.detach(), self.layers[name]), dtype=dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_after_weight_loading(model, **options)
        del self.undo, self.model  # a copy of the model shall not hold this one
        mark_packed(model, self)
        if vars(self.quantization_config)["prefer"] == "speed":
            logger.info("%s", show_speeds(unpack_slow_layers(model)))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns what `save_pretrained` writes: packed strings under the checkpoint's names."""
        return checkpoint_state(model), {}

    @property
    def is_trainable(self) -> bool:
        """False: there is no gradient through packed weights."""
        return False
