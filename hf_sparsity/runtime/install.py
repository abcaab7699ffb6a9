"""One layer packed or unpacked inside a model: the string, and the module that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.bitmask import codec
from .experts import PackedExperts
from .linear import Packed, PackedLinear


def pack_rows(weight: Tensor, transposed: bool, groups: list[tuple[int, int]]) -> Tensor | None:
    """Returns a matrix as the shortest packed string whose rows are output units; None where dense is no longer.

    `transposed`: the model stores it as `[..., in, out]`. `groups`: the (N, M) that it may have codes of.
    """
    if weight.dtype not in codec.DTYPES or codec.packed_bytes(weight) >= weight.nbytes:
        return None
    strings = [
        codec.pack(weight, group=group, swapped=transposed)
        for group in groups
        if weight.shape[-2 if transposed else -1] % group[1] == 0
    ]
    coded = [packed for packed in strings if codec.read_header(packed).group]  # no longer than a bitmask, by `pack`
    return min(coded, key=len) if coded else codec.pack(weight, swapped=transposed)


def in_rows(packed: Tensor, transposed: bool) -> Tensor:
    """Returns a packed string with output units as rows: the same one, or, unpacked and packed again, another."""
    if codec.read_header(packed).swapped == transposed:
        return packed
    return codec.pack(codec.unpack(packed), swapped=transposed)


def install(model: nn.Module, path: str, packed: Tensor, *, dtype: torch.dtype) -> None:
    """Puts a packed weight where a parameter was: `path` names the parameter, `dtype` is the one it has unpacked."""
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if isinstance(owner, (nn.Linear, Conv1D)):
        parent_path, _, name = owner_path.rpartition(".")
        module: nn.Module = PackedLinear(packed, owner.bias, dtype=dtype, transposed=isinstance(owner, Conv1D))
        module.train(owner.training)
        setattr(model.get_submodule(parent_path), name, module)
    else:
        del owner._parameters[attribute]
        owner.add_module(attribute, PackedExperts(packed, dtype).train(owner.training))


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Yields each packed weight once, as (the name of the parameter it stands for, its module)."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield module.stands_for(name), module


def uninstall(model: nn.Module, path: str, module: Packed) -> None:
    """Puts the dense weight back where `install` put a packed one."""
    owner_path, _, attribute = path.rpartition(".")
    dense = nn.Parameter(module.dense())
    if isinstance(module, PackedLinear):
        parent_path, _, name = owner_path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, _dense_layer(module, dense))
    else:
        owner = model.get_submodule(owner_path)
        del owner._modules[attribute]
        owner.register_parameter(attribute, dense)


def _dense_layer(module: PackedLinear, weight: nn.Parameter) -> nn.Module:
    """Returns the layer that a `PackedLinear` stands for."""
    with torch.device("meta"):
        if module.transposed:
            layer: Any = Conv1D(module.out_features, module.in_features)
        else:
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    layer.weight, layer.bias = weight, module.bias
    return layer.train(module.training)
