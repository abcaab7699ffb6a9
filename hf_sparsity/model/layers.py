"""Find the blocks and the prunable weights of a model.

There is no table of architectures. Blocks are found by three rules that hold for nearly all of transformers. A prunable
weight is a *view*: a parameter, or one expert of it, read as `[out, in]` also where it is stored transposed. So `nn.Linear`,
GPT-2's `Conv1D` and the fused experts of transformers 5 look the same to an algorithm.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .accepted import check_model, quantized_message
from .classes import text_config

# Path components of modules that route tokens to experts; `gate_proj` and the like are not among them.
_ROUTER = re.compile(r"(^|_)(router|gating|gate|wg)$|router|gating", re.IGNORECASE)
# Attributes of a config that describe a tower beside the language model, and the paths of towers that hear.
_TOWER_CONFIGS = ("vision_config", "audio_config")
_AUDIO = re.compile(r"audio|speech|sound", re.IGNORECASE)

STANDS_FOR = "_hf_sparsity_stands_for"  # attribute of a copy that computes: the parameter that is stored


@dataclass(frozen=True)
class Weight:
    """A prunable weight `[out, in]`: where it is stored and how to look at it.

    `parameter` is the full name of the parameter, `module` the module that owns it and `attribute` its name there;
    `expert` is the index in a fused parameter `[experts, ·, ·]`; `transposed` is True where it is stored as `[in, out]`.
    """

    name: str
    parameter: str
    module: nn.Module = field(repr=False, compare=False)
    attribute: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        """The number of weights, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def used(self) -> nn.Parameter:
        """The parameter that the module computes with now: `stored`, or a copy in the dtype that computes."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight now; while a block is lent or masked it is another object than before."""
        return getattr(self.used, STANDS_FOR, self.used)

    def read(self) -> Tensor:
        """Returns the weight as a view `[out, in]` of the parameter, which must be on a device (see `onload`)."""
        return self.part(self.stored.detach())

    def part(self, tensor: Tensor) -> Tensor:
        """Returns this weight's view `[out, in]` of a tensor of the parameter's shape, such as its gradient."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Block:
    """One block of the model and its prunable weights by name, in definition order."""

    name: str
    module: nn.Module = field(repr=False, compare=False)
    weights: dict[str, Weight] = field(repr=False)


@dataclass(frozen=True)
class ModelLayers:
    """The prunable weights of a model by block, in definition order, and what stays dense (`skipped`: name -> reason)."""

    blocks: list[Block]
    skipped: dict[str, str]

    @property
    def weights(self) -> dict[str, Weight]:
        """The prunable weights of all blocks by name, in model order."""
        return {name: weight for block in self.blocks for name, weight in block.weights.items()}


def find_layers(model: PreTrainedModel, ignore: Sequence[str] = (), include: Sequence[str] = ()) -> ModelLayers:
    """Returns every matrix of a model, as prunable or as skipped with the reason.

    Args:
        model: any transformers model, on any device, offloaded or on the meta device.
        ignore: see `SparsityConfig.ignore`.
        include: see `SparsityConfig.include`.

    Raises:
        ValueError: what `check_model` refuses, a model without blocks or without prunable weights, an `ignore` that matches
            nothing, an `include` of a part that the model does not have.
    """
    check_model(model)
    stacks = find_stacks(model, include)
    if not stacks:
        raise ValueError(no_blocks(model))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    blocks: list[Block] = []
    skipped: dict[str, str] = {}
    first_paths: dict[Hashable, str] = {}  # place of a parameter -> the path at which it was met first
    for name, module, reason in stacks:
        weights: dict[str, Weight] = {}
        for path, parameter, owner in _matrices(module, name):
            first = first_paths.get(place := place_of(parameter))
            if first is not None:
                if first != path:
                    skipped[path] = f"is the same parameter as {first}"
                continue
            first_paths[place] = path
            inner = path[len(name) + 1 :]
            if why := reason or _reason_to_skip(inner, parameter, owner, path in tied_names, model):
                skipped[path] = why
                continue
            if not parameter.is_floating_point():
                raise ValueError(quantized_message(f"{path} (dtype {parameter.dtype})"))
            weights |= {w.name: w for w in _views(path, parameter, owner, model)}
        blocks.append(Block(name, module, weights))
    for path, parameter, _ in _matrices(model, ""):
        if place_of(parameter) not in first_paths:
            skipped[path] = "outside the blocks (embedding, head, projector)"
    model_layers = _without(ModelLayers(blocks, skipped), ignore)
    if not model_layers.weights:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(model_layers.skipped.items())[:5])
        raise ValueError(f"nothing to prune in {type(model).__name__}: {reasons}")
    return model_layers


def no_blocks(model: nn.Module) -> str:
    """Returns what is said of a model that has no repeated blocks."""
    return f"no stack of blocks was found in {type(model).__name__}: hf_sparsity prunes models made of repeated blocks"


def place_of(tensor: Tensor) -> Hashable:
    """Returns a value that two tensors share only if they are the same numbers in memory, in the same order."""
    address = 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()
    if not address:
        return id(tensor)
    return address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def find_stacks(model: PreTrainedModel, include: Sequence[str] = ()) -> list[tuple[str, nn.Module, str]]:
    """Returns all blocks as (name, module, reason to skip or ""), outermost stacks only, in definition order.

    The first of three rules that finds any decides: a `ModuleList` of transformers' `GradientCheckpointingLayer`; one of
    classes that `_no_split_modules` names; one of equal modules that holds over 30 % of the parameters. Of a model that also
    sees or hears, blocks outside the language model have a reason to be skipped, unless `include` names their part.
    """
    no_split = set(getattr(model, "_no_split_modules", None) or ())
    total = sum(p.numel() for p in model.parameters())

    def checkpointed(stack: nn.Module) -> bool:
        return all(isinstance(child, GradientCheckpointingLayer) for child in stack.children())

    def named(stack: nn.Module) -> bool:
        return all(type(child).__name__ in no_split for child in stack.children())

    def homogeneous(stack: nn.Module) -> bool:
        kinds = {type(child) for child in stack.children()}
        size = sum(p.numel() for p in stack.parameters())
        several = len(kinds) == 1 and len(list(stack.children())) > 1
        return several and size > 0.3 * total and not kinds & {nn.Linear, nn.Embedding}

    stacks: dict[str, nn.Module] = {}
    for rule in (checkpointed, named, homogeneous):
        for name, module in model.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
                continue
            related = any(name == s or name.startswith(s + ".") or s.startswith(name + ".") for s in stacks)
            if not related and rule(module):
                stacks[name] = module
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    reasons = _reasons_by_part(model, stacks, include)
    return [
        (f"{stack}.{key}", child, reasons[stack])
        for stack in sorted(stacks, key=order.__getitem__)
        for key, child in stacks[stack].named_children()
    ]


def _reasons_by_part(model: PreTrainedModel, stacks: Iterable[str], include: Sequence[str]) -> dict[str, str]:
    """Why the blocks of each stack stay dense, or "": those of towers do, unless their part is included."""
    language = _language_prefix(model)
    parts = {
        stack: ""
        if language is None or f"{stack}.".startswith(language)
        else "audio"
        if _AUDIO.search(stack)
        else "vision"
        for stack in stacks
    }
    for part in include:
        if part not in parts.values():
            there = ", ".join(sorted({p for p in parts.values() if p})) or "no towers beside its language model"
            raise ValueError(f"include={part!r}: {type(model).__name__} has no such part; it has {there}")
    return {
        stack: "" if not part or part in include else f'not part of the language model (include="{part}" prunes it)'
        for stack, part in parts.items()
    }


def is_of_text(model: PreTrainedModel, block: Block) -> bool:
    """Returns whether a block sees the tokens of the text: False in the tower of a model that also sees or hears."""
    language = _language_prefix(model)
    return language is None or f"{block.name}.".startswith(language)


def _language_prefix(model: PreTrainedModel) -> str | None:
    """The path of the language model inside a model that also sees or hears, with a dot at its end; else None."""
    config = model.config
    if text_config(config) is config or not any(getattr(config, name, None) is not None for name in _TOWER_CONFIGS):
        return None
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), None)


def _matrices(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yields all parameters of two or more dimensions as (path, parameter, the module that owns it)."""
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                yield (f"{path}.{attribute}" if path else attribute), parameter, owner


def _reason_to_skip(path: str, parameter: nn.Parameter, owner: nn.Module, tied: bool, model: PreTrainedModel) -> str:
    """Returns why a matrix inside a block stays dense, or "" for a prunable one; `path` is relative to the block."""
    if tied:
        return "tied to another weight"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    *components, attribute = path.split(".")
    if "bias" in attribute.split("_"):
        return "bias"
    if isinstance(owner, (nn.Linear, Conv1D)) and attribute == "weight":
        out = parameter.shape[1] if isinstance(owner, Conv1D) else parameter.shape[0]
        routes = any(_ROUTER.search(c) for c in components) and (out == 1 or out in _expert_counts(model.config))
        return "router" if routes else ""
    if any(_ROUTER.search(c) for c in [*components, type(owner).__name__]) and parameter.ndim == 2:
        return "router"
    if parameter.ndim == 3 and _is_experts(components, owner, parameter):
        return ""
    return f"a parameter of {type(owner).__name__}, which is not a linear layer"


def _expert_counts(config: Any) -> set[int]:
    """The numbers above 1 in a config that may be a number of experts."""
    entries = (entry for part in (config, text_config(config)) for entry in vars(part).items())
    return {value for key, value in entries if "expert" in key and isinstance(value, int) and value > 1}


def _is_experts(components: list[str], owner: nn.Module, parameter: nn.Parameter) -> bool:
    by_name = "expert" in type(owner).__name__.lower() or any("expert" in c.lower() for c in components)
    return by_name or hasattr(owner, "is_transposed") or getattr(owner, "num_experts", None) == parameter.shape[0]


def _views(path: str, parameter: nn.Parameter, owner: nn.Module, model: PreTrainedModel) -> Iterator[Weight]:
    base, attribute = path.rsplit(".", 1)
    if parameter.ndim == 2:
        transposed = isinstance(owner, Conv1D)
        first, second = parameter.shape
        shape = (second, first) if transposed else (first, second)
        yield Weight(base, path, owner, attribute, shape, None, transposed)
        return
    transposed = _experts_are_transposed(path, parameter, owner, model)
    shape = (parameter.shape[2], parameter.shape[1]) if transposed else (parameter.shape[1], parameter.shape[2])
    for expert in range(parameter.shape[0]):
        yield Weight(f"{path}[{expert}]", path, owner, attribute, shape, expert, transposed)


def _experts_are_transposed(path: str, parameter: nn.Parameter, owner: nn.Module, model: PreTrainedModel) -> bool:
    """Returns whether fused experts are stored as `[experts, in, out]`; the input observer checks the answer on real products."""
    if hasattr(owner, "is_transposed"):
        return bool(owner.is_transposed)
    width = getattr(text_config(model.config), "hidden_size", None)
    first, second = parameter.shape[1] == width, parameter.shape[2] == width
    if first == second:
        return False
    name = ".".join(path.split(".")[-2:])
    return second if "down" in name or "out" in name else first


def matches(name: str, pattern: str) -> bool:
    """Returns whether a pattern means a layer: its full name, the end of it, the path of a module around it, or a glob."""
    bare = name.split("[")[0]
    return (
        pattern in (name, bare)
        or bare.endswith("." + pattern)
        or name.startswith((pattern + ".", pattern + "["))
        or fnmatch.fnmatchcase(name, pattern)
    )


def _without(model_layers: ModelLayers, ignore: Sequence[str]) -> ModelLayers:
    """Moves the layers that `ignore` means from the prunable to the skipped ones."""
    if not ignore:
        return model_layers
    skipped, used = dict(model_layers.skipped), set()
    blocks = []
    for block in model_layers.blocks:
        kept = {}
        for name, weight in block.weights.items():
            hits = [pattern for pattern in ignore if matches(name, pattern)]
            used.update(hits)
            if hits:
                skipped[name] = f"ignored ({hits[0]})"
            else:
                kept[name] = weight
        blocks.append(Block(block.name, block.module, kept))
    for pattern in ignore:
        # A pattern for what is dense anyway, such as lm_head, is no mistake.
        if pattern not in used and not any(
            matches(n, pattern) or matches(n.removesuffix(".weight"), pattern) for n in model_layers.skipped
        ):
            raise ValueError(
                f"ignore={pattern!r} matches no layer; layers are named like {next(iter(model_layers.weights))!r}"
            )
    return ModelLayers(blocks, skipped)
