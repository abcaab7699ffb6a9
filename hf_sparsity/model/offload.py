"""Lend a block's offloaded weights to its device, and write changes back to where they came from.

accelerate loads each leaf at each call and drops what was changed. Everything that knows its hooks is here.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, set_module_tensor_to_device
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Weight

_STORE = "_hf_sparsity_source"  # the attribute of a model that holds its `WeightStore`


class WeightStore(Mapping[str, Tensor], ABC):
    """Where a model whose blocks come and go reads their weights: full parameter name -> tensor on its device.

    `order`: the indices of the blocks in the order of their visits, once somebody has watched a forward pass.
    `fingerprints`: those already computed of the stored weights, by the names of the layers looked at.
    `reads_ahead`: whether reading a block also asks for the next one.
    """

    order: list[int] | None = None
    reads_ahead: bool = True
    fingerprints: dict[tuple[str, ...], str | None]

    @abstractmethod
    def is_written(self, name: str) -> bool:
        """True if a changed parameter is already stored where it will be read next."""

    @abstractmethod
    def release(self) -> None:
        """Drops the block that is held, so that the next use reads it again."""

    @abstractmethod
    def redirect(self, block: str, folder: str | os.PathLike[str], weight_map: Mapping[str, str]) -> None:
        """From now on reads a block from the files in `folder`; `weight_map`: name of a tensor -> its file."""


def attach_store(model: nn.Module, store: WeightStore) -> None:
    """Makes `store` the one that `weight_store(model)` returns."""
    setattr(model, _STORE, store)


def weight_store(model: nn.Module) -> WeightStore | None:
    """Returns where a streamed model reads its blocks from; None for any other model."""
    return getattr(model, _STORE, None)


class Onloaded:
    """The parameters of a block while it is on its device; `write` is the only way to change them."""

    def __init__(self) -> None:
        self.owners: dict[tuple[int, str], tuple[AlignDevicesHook, str]] = {}  # (module, attribute) -> hook and its key
        self.changed: set[tuple[int, str]] = set()
        self.modules: dict[int, nn.Module] = {}

    @torch.no_grad()
    def write(self, weight: Weight, value: Tensor) -> None:
        """Replaces a weight, `value` `[out, in]`; an offloaded one goes to its store when the block leaves."""
        weight.read().copy_(value)
        key = (id(weight.module), weight.attribute)
        if key in self.owners:
            self.changed.add(key)


@contextmanager
def onload(module: nn.Module) -> Iterator[Onloaded]:
    """Lends a block's offloaded weights to its device, and keeps them there over any number of calls.

    accelerate loads each leaf at each call and drops what was changed. While lent, the hooks only
    move inputs. On leaving, changed parameters go back to where they came from: into the CPU map in
    place (ties stay), or to a **new** file of the offload folder; a source checkpoint is never touched.
    Without hooks this does nothing.

    Raises:
        RuntimeError: a block from `open_streamed` was changed and nobody has written it to a folder.
    """
    loaded = Onloaded()
    hooks: list[tuple[AlignDevicesHook, nn.Module]] = []
    try:
        for child in module.modules():
            hook = _offload_hook(child)
            if hook is None:
                continue
            hooks.append((hook, child))
            for name, _ in list(
                named_module_tensors(child, include_buffers=hook.offload_buffers, recurse=hook.place_submodules)
            ):
                set_module_tensor_to_device(child, name, hook.execution_device, value=hook.weights_map[name])
                *path, attribute = name.split(".")
                owner = child.get_submodule(".".join(path))
                loaded.owners[(id(owner), attribute)] = (hook, name)
                loaded.modules[id(owner)] = owner
            hook.offload = False
        for name, parameter in module.named_parameters():
            if parameter.device.type == "meta":
                raise ValueError(f"weight {name} is on the meta device and no offload hook of its block owns it")
        yield loaded
        _check_written(loaded)  # not when something else went wrong, which this must not hide
    finally:
        for key in sorted(loaded.changed, key=str):
            hook, name = loaded.owners[key]
            value = loaded.modules[key[0]]._parameters[key[1]]
            assert value is not None
            _store(hook, name, value.detach())
        for hook, child in hooks:
            hook.offload = True
            for name, _ in list(
                named_module_tensors(child, include_buffers=hook.offload_buffers, recurse=hook.place_submodules)
            ):
                set_module_tensor_to_device(child, name, "meta")
            store, _ = _source_of(hook, "")
            if isinstance(store, WeightStore):
                store.release()


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def _source_of(hook: AlignDevicesHook, name: str) -> tuple[Any, str]:
    """(the map in which a hook's parameter is, its key there)."""
    store, key = hook.weights_map, name
    while isinstance(store, PrefixedDataset):
        store, key = store.dataset, store.prefix + key
    return store, key


def _check_written(loaded: Onloaded) -> None:
    for owner in loaded.changed:
        store, key = _source_of(*loaded.owners[owner])
        if isinstance(store, WeightStore) and not store.is_written(key):
            raise RuntimeError(f"{key} was changed, but a streamed model is pruned into a folder; pass output_dir")


def _store(hook: AlignDevicesHook, name: str, value: Tensor) -> None:
    store, key = _source_of(hook, name)
    if isinstance(store, WeightStore):
        return  # it is on disk already, see `_check_written`
    in_memory = store.state_dict if isinstance(store, OffloadedWeightsLoader) else store
    if key in in_memory:
        in_memory[key].copy_(value)
        return
    entry = store.index[key]
    dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else value.dtype
    if store.save_folder is None:
        store.save_folder = tempfile.mkdtemp(prefix="hf_sparsity_offload_")
    os.makedirs(store.save_folder, exist_ok=True)
    file = os.path.join(store.save_folder, f"{key}.pruned.safetensors")
    partial = f"{file}.{os.getpid()}.partial"  # processes of one run may share the folder
    save_file({key: value.to("cpu", dtype).contiguous()}, partial)
    os.replace(partial, file)
    new = {"safetensors_file": file, "weight_name": key, "dtype": str(dtype).removeprefix("torch.")}
    place = (entry.get("safetensors_file"), entry.get("weight_name", key))
    for other, known in list(store.index.items()):  # names tied to this tensor follow it
        if known is entry or (
            entry.get("safetensors_file") and (known.get("safetensors_file"), known.get("weight_name", other)) == place
        ):
            store.index[other] = new


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the embeddings are computed; accelerate's hooks move inputs on from there."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
