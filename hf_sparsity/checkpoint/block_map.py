"""Which tensors of a checkpoint make which block of a model; ties between parameters, and files that replace others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ..model.layers import find_stacks, no_blocks
from .conversion import slots, some, targets
from .safetensors_index import Stored, read_headers


@dataclass(frozen=True)
class BlockMap:
    """A map of which parameters of a model are read with which block. All names are full names in the model.

    Attributes:
        blocks: the blocks by name.
        names: block -> the parameters that are read with it, by all their names there.
        owner: each of these -> its block.
        origin: parameter -> the name, of those tied to it, that the checkpoint provides.
        resident: parameters that something outside the blocks uses too; they stay in memory.
        streamed: parameters that come and go, by all names under which they are reached.
    """

    blocks: Mapping[str, nn.Module]
    names: Mapping[str, list[str]]
    owner: Mapping[str, str]
    origin: Mapping[str, str]
    resident: frozenset[str]
    streamed: frozenset[str]
    _modules: Mapping[str, nn.Module] = field(repr=False)
    _homes: Mapping[int, str] = field(repr=False)  # id of a module -> its block

    @classmethod
    def of(cls, model: PreTrainedModel, present: set[str]) -> BlockMap:
        """Returns the map of a model; `present`: names of its state that the checkpoint provides.

        Raises:
            ValueError: a model without blocks, a module used both in a block and around it, or missing parameters.
        """
        blocks = {name: module for name, module, _ in find_stacks(model)}
        _check_blocks(model, blocks)
        homes = {id(m): name for name, module in reversed(blocks.items()) for m in module.modules()}
        places = slots(model)
        origin, resident = _resolve_ties(places, homes, present)
        names = {
            block: [
                name
                for inner, _ in module.named_parameters(remove_duplicate=False)
                if (name := f"{block}.{inner}") not in resident
            ]
            for block, module in blocks.items()
        }
        return cls(
            blocks=blocks,
            names=names,
            owner={name: block for block, inner in names.items() for name in inner},
            origin=origin,
            resident=frozenset(resident),
            streamed=frozenset(n for n, (module, _) in places.items() if n not in resident and id(module) in homes),
            _modules=dict(model.named_modules(remove_duplicate=False)),
            _homes=homes,
        )

    def home(self, name: str) -> str:
        """Returns the block of a parameter or buffer, or ""; a module used by several blocks belongs to the first."""
        return self._homes.get(id(self._modules[name.rpartition(".")[0]]), "")


class CheckpointKeys:
    """The names of the checkpoint tensors that make each block, and in which files they are now.

    `stored`: name -> place. `targets`: name -> the name in the model; tensors that the model has no use for are left out.
    """

    def __init__(self, model: PreTrainedModel, blocks: BlockMap, stored: Mapping[str, Stored]):
        self.stored = dict(stored)
        self.targets = targets(model, stored)
        self._model, self._map = model, blocks
        self._by_block: dict[str, list[str]] = {block: [] for block in ["", *blocks.blocks]}
        for key in self.sorted(self.targets):
            self._by_block[blocks.home(self.targets[key])].append(key)

    def of(self, block: str) -> list[str]:
        """Returns the names of a block's tensors, buffers included, in the order in which they are stored; "": the rest."""
        return list(self._by_block[block])

    def needed(self, block: str) -> list[str]:
        """Returns the names of what a block's parameters are made of, those shared with other blocks included."""
        needed = [key for key in self.of(block) if self.targets[key] in self._map.streamed]
        origins = {self._map.origin[name] for name in self._map.names[block]}
        elsewhere = {name for name in origins if self._map.home(name) != block}
        if elsewhere:
            needed += [key for key, target in self.targets.items() if target in elsewhere]
        return self.sorted(needed)

    def sorted(self, keys: Iterable[str]) -> list[str]:
        """Returns names in the order in which their tensors are stored."""
        return sorted(keys, key=lambda key: self.stored[key][:2])

    def replace(self, block: str, folder: str | os.PathLike[str], weight_map: Mapping[str, str]) -> None:
        """Makes other files those of a block; see `StreamedWeights.redirect`."""
        before = {key: self.targets[key] for key in self.of(block)}
        now = {k: t for k, t in targets(self._model, weight_map).items() if self._map.home(t) == block}
        headers = {file: read_headers([os.path.join(folder, file)]) for file in {weight_map[key] for key in now}}
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        fewer = Counter(before.values()) - Counter(now.values())  # of several that make one, all are needed
        lacking = (set(fewer) & self._map.streamed) - set(tied) - set(tied.values())
        lacking |= {key for key in now if key not in headers[weight_map[key]]}
        if lacking:
            raise ValueError(f"{str(folder)!r} lacks {len(lacking)} tensors of {block}: {some(lacking)}")
        for key, target in before.items():
            if target in now.values():
                del self.stored[key], self.targets[key]
        self.stored |= {key: headers[weight_map[key]][key] for key in now}
        self.targets |= now
        self._by_block[block] = self.sorted({*now, *(key for key in before if key in self.targets)})


def _resolve_ties(
    places: Mapping[str, tuple[nn.Module, str]], homes: Mapping[int, str], present: set[str]
) -> tuple[dict[str, str], set[str]]:
    """Returns (parameter -> its name in the checkpoint, as the model says it; those that something outside blocks uses)."""
    ties: dict[int, list[str]] = {}
    for name, (module, attribute) in places.items():
        ties.setdefault(id(module._parameters[attribute]), []).append(name)
    origin: dict[str, str] = {}
    resident: set[str] = set()
    for names in ties.values():
        provided = next((name for name in names if name in present), None)
        origin |= {name: name if name in present else provided for name in names if provided is not None}
        if any(id(places[name][0]) not in homes for name in names):
            resident.update(names)
    if missing := [name for name in places if name not in origin]:
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters of the model: {some(missing)}")
    return origin, resident


def _check_blocks(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for a model without blocks, or with a module that is used both in a block and around it."""
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
