"""Compute in another precision than the weights are stored in, a block at a time.

Most processors multiply float32 several times faster than bfloat16, for which they have no instructions. So weights stay
as the checkpoint has them, and while a block runs, copies of them in the dtype that computes stand in for them; what is
outside the blocks is lent module by module, for its own call. Memory grows by one block. Rounding is not undone: the
weights have the checkpoint's values, and what is pruned is rounded to its dtype before the next block sees its output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.shards import is_sharded
from ..validation import check_compute_dtype
from .inference import replaced_forwards
from .layers import STANDS_FOR, find_stacks
from .offload import input_device, onload

_DTYPES = "_hf_sparsity_dtypes"  # attribute of a module inside `computing`: (dtype that is stored, dtype that computes)
_HALF = (torch.bfloat16, torch.float16)


def compute_dtype(model: PreTrainedModel, choice: str = "auto") -> torch.dtype:
    """Returns the dtype that a choice means for a model.

    Args:
        model: whose weights are in memory, offloaded, or streamed.
        choice: "auto": the model's own where all its devices have instructions for it, else float32; "model": its own;
            "float32" or "bfloat16".

    Raises:
        ValueError: another choice, or one that a quantized or sharded model cannot follow; "auto" leaves these as they are.
    """
    check_compute_dtype(choice)
    own: torch.dtype = model.dtype
    lendable = all(p.is_floating_point() and not is_sharded(p) for p in model.parameters())
    if choice == "auto":
        devices = {p.device for p in model.parameters() if not p.is_meta} | {input_device(model)}
        slow = own in _HALF and not all(has_instructions(own, device) for device in devices)
        return torch.float32 if slow and lendable else own
    wanted = own if choice == "model" else getattr(torch, choice)
    if wanted != own and not lendable:
        raise ValueError(
            f"compute_dtype={choice!r}: {type(model).__name__} is quantized or sharded, and computes as it is; give "
            "compute_dtype='model' (--compute-dtype model)"
        )
    return wanted


def has_instructions(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether a device multiplies matrices of this dtype by instructions of its own, as torch says."""
    if dtype not in _HALF:
        return True
    if device.type == "cuda":
        return dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or _cpu_has(dtype)


@functools.cache
def _cpu_has(dtype: torch.dtype) -> bool:
    """Asks torch for the processor's instruction sets; False where this torch does not tell."""
    names = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),  # the last is ARM's
        torch.float16: ("avx512_fp16", "amx_fp16"),
    }[dtype]
    if hasattr(torch.cpu, "get_capabilities"):  # since torch 2.11
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in names)
    older = {torch.bfloat16: "_is_avx512_bf16_supported"}.get(dtype, "")  # private, and gone in newer releases
    return bool(getattr(torch.cpu, older, lambda: False)())


def recorded_name(model: PreTrainedModel, computes: torch.dtype) -> str | None:
    """Returns how plans and reports name the dtype that computes; None where it can only be the model's own.

    None for a model in float32 that computes so: there was never a choice.
    """
    return None if computes == model.dtype and computes not in _HALF else str(computes).removeprefix("torch.")


@contextmanager
def computing(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Lets every forward pass of a model compute in `dtype`; its weights stay as they are stored.

    A block's weights are lent for its call, or longer inside `lent_precision`. Hidden states between blocks are in
    `dtype`. Gradients pass to the stored weights, in their dtype. Nothing is changed where `dtype` is the model's own.
    """
    stored = model.dtype
    if dtype == stored:
        yield
        return
    blocks = [module for _, module, _ in find_stacks(model)]
    units = [*blocks, *_outside(model, blocks, stored)]
    before = [unit.__dict__.get(_DTYPES) for unit in units]
    for unit in units:
        setattr(unit, _DTYPES, (stored, dtype, unit in blocks))
    try:
        with replaced_forwards(units, [_lending(unit, stored, dtype) for unit in units]):
            yield
    finally:
        for unit, value in zip(units, before, strict=True):
            if value is None:
                delattr(unit, _DTYPES)
            else:
                setattr(unit, _DTYPES, value)


@contextmanager
def computing_as(choice: str, *models: PreTrainedModel | None) -> Iterator[None]:
    """Lets each of several models compute in the dtype that a choice means for it, see `compute_dtype`; None is left out."""
    with ExitStack() as stack:
        for model in {id(model): model for model in models if model is not None}.values():
            stack.enter_context(computing(model, compute_dtype(model, choice)))
        yield


def _outside(model: nn.Module, blocks: list[nn.Module], stored: torch.dtype) -> list[nn.Module]:
    """The modules with tensors of their own that neither lie in a block nor hold one."""
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    own = [module for module in outside if any(True for _ in _tensors(module, stored))]
    return [module for module in own if not any(id(part) in inside for part in module.modules())]


def _tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yields (table, name in it, tensor) of a module's own parameters and buffers of this dtype."""
    for table in (module._parameters, module._buffers):
        yield from ((table, name, t) for name, t in table.items() if t is not None and t.dtype == dtype)


def _lending(unit: nn.Module, stored: torch.dtype, dtype: torch.dtype) -> Callable[..., Any]:
    """Returns a forward for a module that computes in `dtype` on arguments of either dtype."""
    original = unit.forward

    if isinstance(unit, nn.Embedding):  # only looks up: the rows are converted, not the table

        @functools.wraps(original)
        def look_up(*args: Any, **kwargs: Any) -> Any:
            return _converted(original(*args, **kwargs), stored, dtype)

        return look_up

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with onload(unit), lent_precision(unit):
            return original(*_converted(args, stored, dtype), **_converted(kwargs, stored, dtype))

    return forward


def _converted(value: Any, stored: torch.dtype, dtype: torch.dtype) -> Any:
    """Returns nested arguments with tensors of the one dtype in the other; what holds none is returned as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == stored else value
    if type(value) in (tuple, list):
        made = [_converted(item, stored, dtype) for item in value]
        return type(value)(made) if any(new is not old for new, old in zip(made, value, strict=True)) else value
    if type(value) is dict:
        new = {key: _converted(item, stored, dtype) for key, item in value.items()}
        return new if any(new[key] is not value[key] for key in new) else value
    return value


@contextmanager
def lent_precision(module: nn.Module) -> Iterator[None]:
    """Lets copies in the dtype that computes stand in for a block's weights, which must be on their device.

    Inside `computing` every call of the block does so; over many calls it is done once by this. Outside, and where it
    was done already, nothing happens. `Weight.stored` is the stored parameter inside, too, and `Weight.used` the copy.
    """
    stored, dtype, deep = module.__dict__.get(_DTYPES, (None, None, False))
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    if stored is not None:
        parts = module.modules() if deep else [module]
        places = [place for part in parts for place in list(_tensors(part, stored)) if not place[2].is_meta]
    copies: dict[int, Tensor] = {}  # by the tensor that each stands for: tied weights stay tied
    with ExitStack() as stack:
        for table, name, tensor in places:
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy(tensor, dtype)
            table[name] = copies[id(tensor)]
            stack.callback(table.__setitem__, name, tensor)
        del copies
        yield


def is_lent_precision(module: nn.Module) -> bool:
    """Returns whether a block computes with copies of its weights: inside `computing`, in another dtype than theirs."""
    return _DTYPES in module.__dict__


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor in another dtype, which knows the one that it stands for; gradients pass if they are wanted."""
    copy = tensor.to(dtype)
    if isinstance(tensor, nn.Parameter) and not copy.requires_grad:
        copy = nn.Parameter(copy, requires_grad=False)
    setattr(copy, STANDS_FOR, tensor)
    return copy


def largest_block(model: PreTrainedModel) -> int:
    """Returns the number of weights in the largest block; 0 for a model without blocks."""
    sizes = (sum(math.prod(p.shape) for p in block.parameters()) for _, block, _ in find_stacks(model))
    return max(sizes, default=0)
