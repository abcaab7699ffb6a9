"""Find blocks and prunable weights.

There is no table of architectures. Blocks are found by three rules that hold for nearly all of
transformers; a prunable weight is a *view*: a parameter, perhaps one expert of it, perhaps
transposed, read as `[out, in]`. So `nn.Linear`, GPT-2's `Conv1D` and the fused experts of
transformers 5 are the same thing to an algorithm.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

# Path components of modules that route tokens; `gate_proj` and the like are not among them.
_ROUTER = re.compile(r"(^|_)(router|gating|gate|wg)$|router|gating", re.IGNORECASE)
_PATCH_ATTRIBUTES = ("vision_config", "audio_config")


@dataclass(frozen=True)
class Weight:
    """A prunable weight `[out, in]`: where it is stored and how to look at it.

    `parameter` is the full name of the parameter, `module` and `attribute` its owner and name there;
    `expert` the index in a fused parameter `[experts, ·, ·]`; `transposed` tells storage as `[in, out]`.
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
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight now: while it is lent or masked another object than before."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def read(self) -> Tensor:
        """The weight as a view `[out, in]` of the parameter, which must be on a device (see `onload`)."""
        return self.part(self.stored.detach())

    def part(self, tensor: Tensor) -> Tensor:
        """The view `[out, in]` that is this weight's of a tensor of the parameter's shape, such as its gradient."""
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
    """What of a model can be pruned (`blocks`, in definition order) and what not (`skipped`: name -> reason)."""

    blocks: list[Block]
    skipped: dict[str, str]

    @property
    def weights(self) -> dict[str, Weight]:
        """All prunable weights by name, in model order."""
        return {name: weight for block in self.blocks for name, weight in block.weights.items()}


def find_layers(model: PreTrainedModel, ignore: Sequence[str] = ()) -> ModelLayers:
    """Names every matrix of the model as prunable or not.

    Args:
        model: any transformers model, on any device, offloaded or on the meta device.
        ignore: see `SparsityConfig.ignore`.

    Raises:
        ValueError: no blocks or no prunable weight found, a quantized model, or an `ignore` that matches nothing.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantized; its weights cannot be pruned. Prune the original, then quantize: zeros stay zero"
        )
    stacks = find_stacks(model)
    if not stacks:
        raise ValueError(
            f"no stack of blocks was found in {type(model).__name__}: hf_sparsity prunes models made of repeated blocks"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tied |= set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    blocks: list[Block] = []
    skipped: dict[str, str] = {}
    seen: dict[int, str] = {}
    inside: set[int] = set()
    for name, module, reason in stacks:
        weights: dict[str, Weight] = {}
        for path, parameter, owner in _matrices(module, name):
            inside.add(id(parameter))
            if id(parameter) in seen:
                if seen[id(parameter)] != path:
                    skipped[path] = f"is the same parameter as {seen[id(parameter)]}"
                continue
            seen[id(parameter)] = path
            why = reason or _reason_to_skip(path[len(name) + 1 :], parameter, owner, path in tied, model)
            if why:
                skipped[path] = why
                continue
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{path} has dtype {parameter.dtype}: a quantized model cannot be pruned; prune the original first"
                )
            weights |= {w.name: w for w in _views(path, parameter, owner, model)}
        blocks.append(Block(name, module, weights))
    for path, parameter, _ in _matrices(model, ""):
        if id(parameter) not in inside:
            skipped[path] = "outside the blocks (embedding, head, projector)"
    model_layers = _without(ModelLayers(blocks, skipped), ignore)
    if not model_layers.weights:
        raise ValueError(
            f"nothing to prune in {type(model).__name__}: "
            + "; ".join(f"{k}: {v}" for k, v in list(model_layers.skipped.items())[:5])
        )
    return model_layers


def find_stacks(model: PreTrainedModel) -> list[tuple[str, nn.Module, str]]:
    """All blocks as (name, module, reason to skip or ""), outermost stacks only, in definition order.

    Rules, first match wins: a `ModuleList` of transformers' `GradientCheckpointingLayer`; one of
    classes named in `_no_split_modules`; one of equal modules that holds over 30 % of the parameters.
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
        return (
            len(kinds) == 1
            and len(list(stack.children())) > 1
            and size > 0.3 * total
            and not kinds & {nn.Linear, nn.Embedding}
        )

    found: dict[str, nn.Module] = {}
    for rule in (checkpointed, named, homogeneous):
        for name, module in model.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
                continue
            related = any(name == f or name.startswith(f + ".") or f.startswith(name + ".") for f in found)
            if not related and rule(module):
                found[name] = module
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    language = _language_prefix(model)
    return [
        (
            f"{stack}.{key}",
            child,
            "" if language is None or f"{stack}.".startswith(language) else "not part of the language model",
        )
        for stack in sorted(found, key=order.__getitem__)
        for key, child in found[stack].named_children()
    ]


def _language_prefix(model: PreTrainedModel) -> str | None:
    """Path of the language model inside a model that also sees or hears, else None."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    if text is config or not any(getattr(config, a, None) is not None for a in _PATCH_ATTRIBUTES):
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), None)


def _matrices(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                yield (f"{path}.{attribute}" if path else attribute), parameter, owner


def _reason_to_skip(path: str, parameter: nn.Parameter, owner: nn.Module, tied: bool, model: PreTrainedModel) -> str:
    """Why a matrix inside a block stays dense, or ""; `path` is relative to the block."""
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
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    return {v for c in configs for k, v in vars(c).items() if "expert" in k and isinstance(v, int) and v > 1}


def _is_experts(components: list[str], owner: nn.Module, parameter: nn.Parameter) -> bool:
    called = "expert" in type(owner).__name__.lower() or any("expert" in c.lower() for c in components)
    return called or hasattr(owner, "is_transposed") or getattr(owner, "num_experts", None) == parameter.shape[0]


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
    """Whether fused experts are stored `[experts, in, out]`; the tap checks the answer on real products."""
    if hasattr(owner, "is_transposed"):
        return bool(owner.is_transposed)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    width = getattr(config, "hidden_size", None)
    first, second = parameter.shape[1] == width, parameter.shape[2] == width
    if first == second:
        return False
    name = ".".join(path.split(".")[-2:])
    return second if "down" in name or "out" in name else first


def matches(name: str, pattern: str) -> bool:
    """Whether a layer is meant: its full name, the end of it, a module path above it, or a glob."""
    bare = name.split("[")[0]
    return (
        pattern in (name, bare)
        or bare.endswith("." + pattern)
        or name.startswith((pattern + ".", pattern + "["))
        or fnmatch.fnmatchcase(name, pattern)
    )


def _without(model_layers: ModelLayers, ignore: Sequence[str]) -> ModelLayers:
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
        # Naming what is dense anyway (lm_head) is a harmless wish, not a mistake.
        if pattern not in used and not any(
            matches(n, pattern) or matches(n.removesuffix(".weight"), pattern) for n in model_layers.skipped
        ):
            raise ValueError(
                f"ignore={pattern!r} matches no layer; layers are named like {next(iter(model_layers.weights))!r}"
            )
    return ModelLayers(blocks, skipped)
