"""Lend a block's offloaded weights to its device, and write changes back to where they came from.

accelerate loads the parameters of each module at each call and drops what was changed.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, set_module_tensor_to_device
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import replacing
from .layers import ModelLayers, Weight

_STORE = "_hf_sparsity_source"  # the attribute of a model that holds its `WeightStore`


class WeightStore(Mapping[str, Tensor], ABC):
    """The place from which a model reads the weights of its blocks: full parameter name -> tensor on its device.

    `first_passes` has what `first_pass` learned of the model, by the names of a batch's inputs.
    `fingerprints` has those that were computed of the stored weights, by the names of the layers that were sampled.
    `reads_ahead` says whether reading a block also asks the system for the next one.
    """

    first_passes: dict[frozenset[str], Any]
    reads_ahead: bool = True
    fingerprints: dict[tuple[str, ...], str | None]

    @abstractmethod
    def is_written(self, name: str) -> bool:
        """Returns whether a changed parameter is already stored where it will be read next."""

    @abstractmethod
    def release(self) -> None:
        """Drops the block that is in memory, so that its next use reads it again."""

    @abstractmethod
    def redirect(self, block: str, folder: str | os.PathLike[str], weight_map: Mapping[str, str]) -> None:
        """Reads a block from other files from now on; `weight_map`: name of a tensor -> its file in `folder`."""


def attach_store(model: nn.Module, store: WeightStore) -> None:
    """Makes a store the one that `weight_store(model)` returns."""
    setattr(model, _STORE, store)


def weight_store(model: nn.Module) -> WeightStore | None:
    """Returns the store that a streamed model reads its blocks from; None for any other model."""
    return getattr(model, _STORE, None)


class Onloaded:
    """The parameters of a block while it is on its device; `write` is the only way to change them."""

    def __init__(self) -> None:
        self.owners: dict[tuple[int, str], tuple[AlignDevicesHook, str]] = {}  # (module, attribute) -> hook and its key
        self.changed: set[tuple[int, str]] = set()
        self.modules: dict[int, nn.Module] = {}

    @torch.no_grad()
    def write(self, weight: Weight, value: Tensor) -> None:
        """Replaces a weight by `value` `[out, in]`; an offloaded one is stored when the block leaves its device.

        A copy that computes for it gets what is stored, rounded to its dtype.
        """
        weight.read().copy_(value)
        if weight.used is not weight.stored:
            weight.part(weight.used.detach()).copy_(weight.read())
        key = (id(weight.module), weight.attribute)
        if key in self.owners:
            self.changed.add(key)


@contextmanager
def onload(module: nn.Module) -> Iterator[Onloaded]:
    """Lends a block's offloaded weights to its device, and keeps them there over any number of calls.

    Meanwhile accelerate's hooks only move inputs. At the end, changed parameters go back to where they came from: in place
    into the CPU's map (tied names stay tied), or to a **new** file of the offload folder; a source checkpoint is never
    touched. A block without hooks is left as it is.

    Raises:
        ValueError: a parameter is on the meta device and no hook can load it.
        RuntimeError: a block from `open_streamed` was changed and not written to a folder.
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
        _check_written(loaded)  # not in `finally`: there it would hide the error of the caller
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


def lent_weights(model_layers: ModelLayers) -> set[str]:
    """Returns the names of the layers whose weights are kept elsewhere and come to their device while they are used."""
    return {name for name, weight in model_layers.weights.items() if weight.stored.device.type == "meta"}


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that loads the parameters of a module at each call, if it has one."""
    attached = getattr(module, "_hf_hook", None)
    hooks = attached.hooks if isinstance(attached, SequentialHook) else [attached]
    return next((hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload), None)


def _source_of(hook: AlignDevicesHook, name: str) -> tuple[Any, str]:
    """The map that holds a hook's parameter, and its key there."""
    store, key = hook.weights_map, name
    while isinstance(store, PrefixedDataset):
        store, key = store.dataset, store.prefix + key
    return store, key


def _check_written(loaded: Onloaded) -> None:
    """Raises RuntimeError if a changed parameter of a streamed model is not in a file yet."""
    for owner in loaded.changed:
        store, key = _source_of(*loaded.owners[owner])
        if isinstance(store, WeightStore) and not store.is_written(key):
            raise RuntimeError(f"{key} was changed, but a streamed model is pruned into a folder; pass output_dir")


def _store(hook: AlignDevicesHook, name: str, value: Tensor) -> None:
    """Puts a changed parameter where its hook will load it from."""
    store, key = _source_of(hook, name)
    if isinstance(store, WeightStore):
        return  # `_check_written` saw that it is on disk
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
    with replacing(file) as temporary:  # processes of one run may share the folder
        save_file({key: value.to("cpu", dtype).contiguous()}, temporary)
    new_entry = {"safetensors_file": file, "weight_name": key, "dtype": str(dtype).removeprefix("torch.")}
    place = (entry.get("safetensors_file"), entry.get("weight_name", key))
    for other, tied in list(store.index.items()):  # other names of the same tensor follow it
        same_place = (tied.get("safetensors_file"), tied.get("weight_name", other)) == place
        if tied is entry or (entry.get("safetensors_file") and same_place):
            store.index[other] = new_entry


def hook_devices(model: nn.Module) -> Iterator[torch.device]:
    """Yields the devices on which accelerate's hooks let the modules of a model run, in the order of the modules.

    A device that is named by its kind alone, or by a number, is the current one of that kind.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            if (named := getattr(one, "execution_device", None)) is not None:
                yield _with_index(torch.device(named))


def _with_index(device: torch.device) -> torch.device:
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    with suppress(AttributeError, RuntimeError):
        return torch.device(device.type, torch.get_device_module(device).current_device())
    return device


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device of the embeddings, to which inputs go; accelerate's hooks move them on from there."""
    named = next(hook_devices(model), None)
    if named is not None:
        return named
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
