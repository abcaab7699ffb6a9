"""Opens a model larger than memory: each block's weights come from its checkpoint while the block is in use.

The model is built without weights. What is outside the blocks is loaded once and stays; a block is
read when it is lent and dropped when it leaves. Weights come in through accelerate's own hook, with our mapping
behind it, so `onload`, a plain forward and evaluation work as with any offloaded model. Names, fused
experts and data types are the business of transformers' converter, run on one block's tensors.

On a CPU the weights are private views of the mapped file: one that is not touched takes no memory,
and one that is written to gets pages of its own, so no write can reach the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ..model.accepted import check_source, reading
from ..model.classes import LOCATION, from_config
from ..model.offload import WeightStore, attach_store
from .block_map import BlockMap, CheckpointKeys
from .conversion import convert, read_parameters, rehearse, slots, some, twin_of
from .locate import find_stored
from .safetensors_index import DTYPES, WEIGHT_DTYPES, Stored, opened, read_headers
from .system import prefetch


class StreamedWeights(WeightStore):
    """Full parameter name -> tensor on the execution device, read block by block; one block is held at a time.

    Made by `open_streamed`. `stored` is what the checkpoint has, `present` the names in the model that it provides.
    `held_block` is the name of the block that is in memory, None if there is none.
    """

    def __init__(
        self, model: PreTrainedModel, stored: Mapping[str, Stored], present: set[str], device: torch.device
    ) -> None:
        self._model, self._device = model, device
        self.source = dict(stored)  # all tensors of the checkpoint, where they were at first
        self.folder = Path(next(iter(stored.values())).file).parent
        self._map = BlockMap.of(model, present)
        self._keys = CheckpointKeys(model, self._map, stored)
        self.used = frozenset(self._keys.targets)  # names in the checkpoint that the model has a use for
        self._resident: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self.held_block: str | None = None
        self._written: set[str] = set()  # blocks redirected since they were last read
        self.fingerprints: dict[tuple[str, ...], str | None] = {}
        self.first_passes: dict[frozenset[str], Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._resident:
            return self._resident[name]
        if name not in self._held:
            self._read(self._map.owner[name])
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._map.owner or name in self._resident

    def __iter__(self) -> Iterator[str]:
        return iter(self._map.owner)

    def __len__(self) -> int:
        return len(self._map.owner)

    def release(self) -> None:
        """Drops the block that is held, so that the next use reads it again."""
        self._held, self.held_block = {}, None

    def block_keys(self, block: str) -> list[str]:
        """Returns the names in the checkpoint of a block's tensors, buffers included, in the order of their storage."""
        self._check(block)
        return self._keys.of(block)

    def other_keys(self) -> list[str]:
        """Returns the names in the checkpoint of the model's tensors outside the blocks."""
        return self._keys.of("")

    def prefetch(self, *blocks: str) -> None:
        """Asks the system to read blocks into its file cache, in this order, and returns at once; nothing is kept here."""
        for block in blocks:
            self._check(block)
        prefetch([self._keys.stored[key] for block in blocks for key in self._keys.needed(block)])

    def redirect(self, block: str, folder: str | os.PathLike[str], weight_map: Mapping[str, str]) -> None:
        """Reads a block from other safetensors files from now on.

        Args:
            block: its name, as in `ModelLayers`.
            folder: where the files are.
            weight_map: names of tensors as in the checkpoint -> file in `folder`; those of other blocks are ignored.

        Buffers and tied parameters that the files lack are read from where they were.

        Raises:
            ValueError: no such block, a file that is not whole, or the files lack a parameter of the block.
        """
        self._check(block)
        self._keys.replace(block, folder, weight_map)
        self._written.add(block)
        if self.held_block == block:
            self.release()

    def is_written(self, name: str) -> bool:
        """Returns whether a changed parameter is already where it will be read next."""
        return self._map.owner.get(name) in self._written

    def load_resident(self) -> None:
        """Loads everything but the parameters of the blocks."""
        keys = [key for key, target in self._keys.targets.items() if target not in self._map.streamed]
        with opened(self._keys.stored, self._keys.sorted(keys)) as tensors:
            convert(self._model, tensors, self._device)

    def attach(self) -> None:
        """Puts a hook on each block, and moves all buffers to the execution device."""
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self._device)
        self._resident = {
            name: self._model.get_parameter(self._map.origin[name]).detach()
            for name in self._map.resident
            if self._map.home(name)
        }
        for name, module in self._map.blocks.items():
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
        """Reads a block, which becomes the one that is held; the model itself stays as it was."""
        self.release()  # before reading, so that there are never two
        order = list(self._map.blocks)
        if self.reads_ahead:
            self.prefetch(*order[order.index(block) :][:2])
        values = read_parameters(self._model, self._keys.stored, self._keys.needed(block), self._device)
        origins = {name: self._map.origin[name] for name in self._map.names[block]}
        if lost := [name for name, origin in origins.items() if origin not in values]:
            raise ValueError(f"{len(lost)} parameters of {block} could not be read: {some(lost)}")
        self._held, self.held_block = {name: values[origin] for name, origin in origins.items()}, block
        self._written.discard(block)

    def _check(self, block: str) -> None:
        if block not in self._map.blocks:
            raise ValueError(f"no block is named {block!r}; they are named like {next(iter(self._map.blocks))!r}")


class _BlockHook(AlignDevicesHook):
    """accelerate's hook, which also drops the block when its forward is over."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output = super().post_forward(module, output)
        if self.offload:
            self.weights_map.dataset.release()
        return output


def read_blocks(
    model: PreTrainedModel, folder: str | os.PathLike[str], blocks: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields (block, {full name of a parameter: tensor}) from shards that were written for a model.

    `blocks`: block -> {name of a tensor in its file: the file in `folder`}. Tensors are float32, which holds all narrower
    values, whatever the config says of the model's dtype.
    """
    if not blocks:
        return
    twin = twin_of(model)
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
    target = _as_device(device)
    trust = bool(location.pop("trust_remote_code", False))
    with reading(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **location)
        stored = find_stored(source, config, location)
    with reading(source), init_empty_weights(include_buffers=False):
        model = from_config(config, auto_class, dtype=_choose_dtype(dtype, config, stored), trust_remote_code=trust)
    model.eval()
    missing = rehearse(model, stored)
    computed = missing & set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    present = set(model.state_dict()) - missing | computed
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    weights = StreamedWeights(model, stored, present, target)
    weights.load_resident()
    _compute(model, computed, target)
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    weights.attach()
    if model.can_generate():
        with suppress(OSError):  # without a file the model has one made from its config
            model.generation_config = GenerationConfig.from_pretrained(source, **location)
    return model


@torch.no_grad()
def _compute(model: PreTrainedModel, names: Collection[str], device: torch.device) -> None:
    """Makes the parameters that no checkpoint has, since their class computes them, such as tables of sines."""
    places = slots(model)
    for name in names:
        module, attribute = places[name]
        parameter = module._parameters[attribute]
        assert parameter is not None
        module._parameters[attribute] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
        model._init_weights(module)


def _as_device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is none that torch knows; give one such as 'cpu' or 'cuda:0'") from error


def _separate(module: nn.Module) -> None:
    """Splits parameters that a block has under two names, since accelerate fills only the first name of each."""
    seen: set[int] = set()
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and id(parameter) in seen:
                child._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            seen.add(id(child._parameters[name]))


def _choose_dtype(dtype: str | torch.dtype, config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """Returns the dtype as transformers chooses it: "auto" is the config's, else the checkpoint's first float dtype."""
    if isinstance(dtype, str) and dtype == "auto":
        dtypes = (DTYPES.get(tensor.dtype) for tensor in stored.values())
        dtype = config.dtype or next((dtype for dtype in dtypes if dtype in WEIGHT_DTYPES), torch.float32)
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype):
        raise ValueError(f'dtype={dtype!r} is not known; give "auto", a torch.dtype or its name')
    return chosen
