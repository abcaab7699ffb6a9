"""Open a model larger than memory: each block's weights come from its checkpoint while the block is in use.

The model is built without weights. What is outside the blocks is loaded once and stays; a block is
read when it is lent and dropped when it leaves. The road in is accelerate's own hook with our mapping
behind it, so `onload`, a plain forward and evaluation work as with any offloaded model. Names, fused
experts and data types are the business of transformers' converter, run on one block's tensors.

On a CPU the weights are private views of the mapped file: one that nobody touches takes no memory,
and one that is written to gets pages of its own, so no write can reach the checkpoint.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ..model.accepted import check_source
from ..model.classes import LOCATION, from_config
from ..model.layers import find_stacks, no_blocks
from ..model.offload import WeightStore, attach_store
from .conversion import convert, read_parameters, rehearse, slots, some, targets
from .locate import find_stored
from .safetensors_index import Stored, opened, prefetch, read_headers

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StreamedWeights(WeightStore):
    """Full parameter name -> tensor on the execution device, read block by block; one block is held at a time.

    Made by `open_streamed`. `stored` is what the checkpoint has, `present` the names in the model that it provides.
    """

    def __init__(
        self, model: PreTrainedModel, stored: Mapping[str, Stored], present: set[str], device: torch.device
    ) -> None:
        self._model, self._device, self._stored = model, device, dict(stored)
        self._held: dict[str, Tensor] = {}
        self._held_block: str | None = None
        self.fingerprints: dict[tuple[str, ...], str | None] = {}
        self._written: set[str] = set()  # blocks redirected since they were last read
        self._blocks = {name: module for name, module, _ in find_stacks(model)}
        self._home = {id(m): name for name, module in reversed(self._blocks.items()) for m in module.modules()}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._slots = slots(model)
        _check_blocks(model, self._blocks)
        self._from, self._fixed = self._resolve_ties(present)
        self._resident: dict[str, Tensor] = {}
        self._streamed = {  # by all names under which a block's parameter is reached
            name for name, (module, _) in self._slots.items() if name not in self._fixed and id(module) in self._home
        }
        self._names = {
            block: [
                name
                for inner, _ in module.named_parameters(remove_duplicate=False)
                if (name := f"{block}.{inner}") not in self._fixed
            ]
            for block, module in self._blocks.items()
        }
        self._owner = {name: block for block, names in self._names.items() for name in names}
        self._targets = targets(model, stored)
        self._keys: dict[str, list[str]] = {block: [] for block in ["", *self._blocks]}
        for key in self._sorted(self._targets):
            self._keys[self._home_of(self._targets[key])].append(key)

    def _resolve_ties(self, present: set[str]) -> tuple[dict[str, str], set[str]]:
        """(parameter -> its name in the checkpoint, as the model says it; those that something outside blocks uses)."""
        ties: dict[int, list[str]] = {}
        for name, (module, attribute) in self._slots.items():
            ties.setdefault(id(module._parameters[attribute]), []).append(name)
        places: dict[str, str] = {}
        fixed: set[str] = set()
        for names in ties.values():
            known = next((name for name in names if name in present), None)
            places |= {name: name if name in present else known for name in names if known is not None}
            if any(id(self._slots[name][0]) not in self._home for name in names):
                fixed.update(names)
        if missing := [name for name in self._slots if name not in places]:
            raise ValueError(f"the checkpoint lacks {len(missing)} parameters of the model: {some(missing)}")
        return places, fixed

    def __getitem__(self, name: str) -> Tensor:
        if name in self._resident:
            return self._resident[name]
        if name not in self._held:
            self._read(self._owner[name])
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._owner or name in self._resident

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def release(self) -> None:
        """Lets go of the block that is held, so that the next use reads it again."""
        self._held, self._held_block = {}, None

    def block_keys(self, block: str) -> list[str]:
        """Names in the checkpoint of a block's tensors, buffers included, in the order in which they are stored."""
        self._check(block)
        return list(self._keys[block])

    def other_keys(self) -> list[str]:
        """Names in the checkpoint of the model's tensors outside the blocks; what the model has no use for is left out."""
        return list(self._keys[""])

    def prefetch(self, *blocks: str) -> None:
        """Asks the system to read blocks into its file cache, in this order, and returns at once; nothing is kept here."""
        prefetch([self._stored[key] for block in blocks for key in self._needed(block)])

    def redirect(self, block: str, folder: str | os.PathLike[str], weight_map: Mapping[str, str]) -> None:
        """Reads a block from other safetensors files from now on.

        Args:
            block: its name, as in `Layout`.
            folder: where the files are.
            weight_map: names of tensors as in the checkpoint -> file in `folder`; those of other blocks are ignored.

        Buffers and tied parameters that the files lack are read from where they were.

        Raises:
            ValueError: no such block, a file that is not whole, or the files lack a parameter of the block.
        """
        before = {key: self._targets[key] for key in self.block_keys(block)}
        now = {k: t for k, t in targets(self._model, weight_map).items() if self._home_of(t) == block}
        found = {file: read_headers([os.path.join(folder, file)]) for file in {weight_map[key] for key in now}}
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        fewer = Counter(before.values()) - Counter(now.values())  # of several that make one, all are needed
        lacking = (set(fewer) & self._streamed) - set(tied) - set(tied.values())
        lacking |= {key for key in now if key not in found[weight_map[key]]}
        if lacking:
            raise ValueError(f"{str(folder)!r} lacks {len(lacking)} tensors of {block}: {some(lacking)}")
        for key, target in before.items():
            if target in now.values():
                del self._stored[key], self._targets[key]
        self._stored |= {key: found[weight_map[key]][key] for key in now}
        self._targets |= now
        self._keys[block] = self._sorted({*now, *(key for key in before if key in self._targets)})
        self._written.add(block)
        if self._held_block == block:
            self.release()

    def is_written(self, name: str) -> bool:
        """Returns whether a changed parameter is already where it will be read: its block was redirected while it was lent."""
        return self._owner.get(name) in self._written

    def load_resident(self) -> None:
        """Loads everything but the parameters of the blocks, and ties what is tied."""
        keys = [key for key, target in self._targets.items() if target not in self._streamed]
        with opened(self._stored, self._sorted(keys)) as tensors:
            convert(self._model, tensors, self._device)

    def attach(self) -> None:
        """Puts a hook on each block, and moves all buffers to the execution device."""
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self._device)
        self._resident = {
            name: self._model.get_parameter(self._from[name]).detach() for name in self._fixed if self._home_of(name)
        }
        for name, module in self._blocks.items():
            _separate(module)
            hook = _BlockHook(
                execution_device=self._device,
                offload=True,
                weights_map=PrefixedDataset(self, f"{name}."),
                place_submodules=True,  # some blocks use the weight of a child without calling it
                skip_keys=getattr(self._model, "_skip_keys_device_placement", None),
            )
            add_hook_to_module(module, hook)
        attach_store(self._model, self)

    def _read(self, block: str) -> None:
        """Makes `block` the one that is held; the model itself is left as it was."""
        self.release()  # before reading, so that there are never two
        order = list(self._blocks)
        if self.reads_ahead:
            self.prefetch(*order[order.index(block) :][:2])
        found = read_parameters(self._model, self._stored, self._needed(block), self._device)
        if lost := [name for name in self._names[block] if self._from[name] not in found]:
            raise ValueError(f"{len(lost)} parameters of {block} could not be read: {some(lost)}")
        self._held, self._held_block = {name: found[self._from[name]] for name in self._names[block]}, block
        self._written.discard(block)

    def _needed(self, block: str) -> list[str]:
        """Names in the checkpoint of what the parameters of a block are made of, those shared with others included."""
        needed = [key for key in self.block_keys(block) if self._targets[key] in self._streamed]
        places = {self._from[name] for name in self._names[block]}
        foreign = {place for place in places if self._home_of(place) != block}
        if foreign:
            needed += [key for key, target in self._targets.items() if target in foreign]
        return self._sorted(needed)

    def _home_of(self, target: str) -> str:
        """The block that a parameter or buffer belongs to, or ""; a module used by several belongs to the first."""
        return self._home.get(id(self._modules[target.rpartition(".")[0]]), "")

    def _sorted(self, keys: Iterable[str]) -> list[str]:
        return sorted(keys, key=lambda key: self._stored[key][:2])

    def _check(self, block: str) -> None:
        if block not in self._blocks:
            raise ValueError(f"no block is named {block!r}; they are named like {next(iter(self._blocks))!r}")


class _BlockHook(AlignDevicesHook):
    """accelerate's hook, which also lets go of the block when its forward is over."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output = super().post_forward(module, output)
        if self.offload:
            self.weights_map.dataset.release()
        return output


def read_blocks(
    model: PreTrainedModel, folder: str | os.PathLike[str], blocks: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields blocks of any model, as name and parameters by full name, from shards that were written for it.

    `blocks`: for each its tensors, as named in the file, and the file in `folder`. In float32, which holds all narrower
    values, whatever the config says of the model's dtype.
    """
    if not blocks:
        return
    with init_empty_weights(include_buffers=False):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    twin.config.dtype = torch.float32
    for name, files in blocks.items():
        stored = read_headers({os.path.join(folder, file) for file in files.values()})
        yield name, read_parameters(twin, stored, sorted(files), torch.device("cpu"))


def open_streamed(
    source: str | os.PathLike[str],
    *,
    auto_class: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **location: Any,
) -> PreTrainedModel:
    """Opens a model whose blocks are read from its checkpoint each time they are used, and dropped afterwards.

    Args:
        source: a folder or Hub id with safetensors, dense or packed.
        auto_class: the class to open it with, or its name; by default the one that `config.json` names.
        dtype: of the weights; "auto": as the config says, else as stored.
        device: where blocks and everything around them are computed; by default the CPU.
        **location: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, `force_download` and
            `trust_remote_code` (off unless given), as in transformers.

    Returns:
        The transformers model in evaluation mode: parameters of its blocks are on the meta device between uses, all
        else is on `device`. `weight_store(model)` is where it reads them from.

    Raises:
        ValueError: no safetensors, files that are not whole, parameters missing or of another shape than the config
            says, a quantized checkpoint, or a model without blocks.
    """
    if unknown := set(location) - set(LOCATION):
        raise ValueError(f"unknown arguments {sorted(unknown)}; a source is found by {', '.join(LOCATION)}")
    location = {name: value for name, value in location.items() if value is not None}
    check_source(source, location)
    trust = bool(location.pop("trust_remote_code", False))
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **location)
    stored = find_stored(source, config, location)
    with init_empty_weights(include_buffers=False):
        model = from_config(config, auto_class, dtype=_choose_dtype(dtype, config, stored), trust_remote_code=trust)
    model.eval()
    target = torch.device("cpu" if device is None else device)
    missing = rehearse(model, stored)
    present = set(model.state_dict()) - missing
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    weights = StreamedWeights(model, stored, present, target)
    weights.load_resident()
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    weights.attach()
    if model.can_generate():
        with suppress(OSError):  # without a file the model has one made from its config
            model.generation_config = GenerationConfig.from_pretrained(source, **location)
    return model


def _check_blocks(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> None:
    """`ValueError` for a model without blocks, or with a module that is used both in a block and around them."""
    if not blocks:
        raise ValueError(no_blocks(model))
    whole = {id(module) for module in blocks.values()}
    inside = {id(m) for module in blocks.values() for m in module.modules() if m._parameters}
    around: list[tuple[str, nn.Module]] = [("", model)]
    while around:
        path, module = around.pop()
        if id(module) in inside:
            raise ValueError(f"{path} is also part of a block; such a model cannot be streamed, load all of it")
        around += [(f"{path}.{n}".strip("."), m) for n, m in module.named_children() if id(m) not in whole]


def _separate(module: nn.Module) -> None:
    """Makes parameters that a block has twice two, since accelerate fills only the first name of each."""
    seen: set[int] = set()
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and id(parameter) in seen:
                child._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            seen.add(id(child._parameters[name]))


def _choose_dtype(dtype: str | torch.dtype, config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """Returns the dtype as transformers chooses it: "auto" is what the config says, else the first floating point type in the checkpoint."""
    if isinstance(dtype, str) and dtype == "auto":
        known = (_DTYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in _DTYPES)
        dtype = config.dtype or next(known, torch.float32)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f'dtype={dtype!r} is not known; give "auto", a torch.dtype or its name')
    return found
