"""One forward pass of the first calibration sequence of each kind, before anything is measured or changed.

It tells the order in which the model visits its blocks, and which prunable layers no statistic can be collected for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..model.inference import Batch, can_be_sliced, replaced_forwards
from ..model.layers import Block, ModelLayers, Weight
from ..model.offload import onload, weight_store
from ..model.precision import is_lent_precision, lent_precision
from .forward import drive
from .observer import InputObserver, hidden_reason
from .operands import Operands, tensors_in

NOT_USED = "no calibration token reached it"
SCRIPTED = "it is used by compiled or scripted code, whose products cannot be observed"
OUTSIDE = "the model uses it without running its block's forward, and only there inputs are observed"
NAMED = 4  # layers that an error message names


@dataclass(frozen=True)
class FirstPass:
    """What the first sequence shows.

    `order`: the indices of the blocks in the order of their visits. `unseen`: layers whose inputs cannot be
    observed, or are not there on this data -> the reason. A single expert that got no token is not among them.
    """

    order: list[int]
    unseen: dict[str, str]

    def check(self, model_layers: ModelLayers, allowed: float) -> None:
        """Raises ValueError when more than the `allowed` share of the prunable weights is unseen."""
        sizes = {name: weight.size for name, weight in model_layers.weights.items()}
        share = sum(sizes.get(name, 0) for name in self.unseen) / sum(sizes.values())
        if share <= allowed:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.unseen.items())[:NAMED])
        more = f"; and {len(self.unseen) - NAMED} more" if len(self.unseen) > NAMED else ""
        raise ValueError(
            f"the inputs of {len(self.unseen)} layers with {share:.0%} of the prunable weights were not seen ({reasons}{more}), "
            f"so that they could only be pruned by magnitude; at most {allowed:.0%} are allowed. Give data that reaches "
            "them, leave them dense (ignore, --ignore), or allow it: allow_unseen=1.0 (--allow-unseen 1.0)"
        )


def first_pass(model: PreTrainedModel, model_layers: ModelLayers, batches: Sequence[Batch]) -> FirstPass:
    """Runs the model on the first sequence; where some batches have images and others do not, on the first of each kind.

    A streamed model, which has to be read for that, keeps the result.

    Raises:
        ValueError: the model's output is NaN or infinite, so no statistic would mean anything.
    """
    store = weight_store(model)
    passes: list[FirstPass] = []
    for kind, batch in {frozenset(batch): batch for batch in reversed(batches)}.items():
        earlier = store.first_passes.get(kind) if store else None
        passes.append(earlier or _run(model, model_layers, batch))
        if store:
            store.first_passes[kind] = passes[-1]
    passes.reverse()
    unseen = {name: reason for name, reason in passes[0].unseen.items() if all(name in p.unseen for p in passes)}
    for other in passes[1:]:
        unseen |= {name: reason for name, reason in other.unseen.items() if name in unseen and reason != NOT_USED}
    unseen = {name: reason for name, reason in unseen.items() if name in model_layers.weights}
    return FirstPass(merged_order([one.order for one in passes]), unseen)


def merged_order(orders: Sequence[Sequence[int]]) -> list[int]:
    """Returns an order of visits of which each of these is a part; the longest of them if the others are parts of it."""
    longest = max(orders, key=len)
    merged = list(longest)
    for order in orders:
        place = 0
        for index in order:
            if index in merged[place:]:
                place = merged.index(index, place) + 1
            else:
                merged.insert(place, index)
                place += 1
    return merged


def _run(model: PreTrainedModel, model_layers: ModelLayers, batch: Batch) -> FirstPass:
    order: list[int] = []
    seen: set[str] = set()

    def note(weight: Weight, inputs: Tensor, in_order: bool) -> None:
        seen.add(weight.name)

    def watched(index: int, block: Block) -> Callable[..., Any]:
        """Returns the block's forward, which notes the visit; also the products, if the weights come only for it."""
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            order.append(index)
            with ExitStack() as stack:
                if _come_for_a_call(block):
                    stack.enter_context(onload(block.module))
                    stack.enter_context(lent_precision(block.module))
                    observers.append(InputObserver(Operands(block.weights.values()), note))
                    stack.enter_context(observers[-1])
                    stack.callback(observers[0].operands.forget_copies)  # the first saw them being made, and holds them
                return original(*args, **kwargs)

        return forward

    blocks = model_layers.blocks
    resident = [weight for weight in model_layers.weights.values() if weight.stored.device.type != "meta"]
    observers = [InputObserver(Operands(resident), note)]
    sequence = {name: value[:1] for name, value in batch.items()} if can_be_sliced(batch) else batch
    forwards = [watched(index, block) for index, block in enumerate(blocks)]
    modules = [block.module for block in blocks]
    with replaced_forwards(modules, forwards), torch.no_grad(), observers[0]:
        output = drive(model, None)(**sequence)
    _check_finite(output)
    hidden = {name: func for observer in reversed(observers) for name, func in observer.hidden.items()}
    unseen = _unseen(model_layers, set(order), seen, hidden)
    if NOT_USED in unseen.values():  # as far as Python can see
        used = _used(model, blocks, resident, sequence)
        scripted = {name for name, reason in unseen.items() if reason == NOT_USED} & used
        unseen |= dict.fromkeys(scripted, SCRIPTED)
    return FirstPass(order, unseen)


def _come_for_a_call(block: Block) -> bool:
    """Returns whether what a block computes with is there only while it is called: read from disk, or a copy."""
    away = any(weight.stored.device.type == "meta" for weight in block.weights.values())
    return bool(block.weights) and (away or is_lent_precision(block.module))


def _used(model: PreTrainedModel, blocks: list[Block], resident: list[Weight], sequence: Batch) -> set[str]:
    """Returns the weights that any operation of a forward pass uses, also of code that is not Python.

    Of a block that computes with copies, those that its own forward uses.
    """
    watchers: list[_UseWatcher] = []

    def watched(block: Block) -> Callable[..., Any]:
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with onload(block.module), lent_precision(block.module):
                watchers.append(_UseWatcher(Operands(block.weights.values())))
                with watchers[-1]:
                    return original(*args, **kwargs)

        return forward

    copied = [block for block in blocks if block.weights and is_lent_precision(block.module)]
    inside = {weight.parameter for block in copied for weight in block.weights.values()}
    watchers.append(_UseWatcher(Operands(weight for weight in resident if weight.parameter not in inside)))
    forwards = [watched(block) for block in copied]
    with replaced_forwards([block.module for block in copied], forwards), watchers[0], torch.no_grad():
        drive(model, None)(**sequence)
    return set().union(*(watcher.used for watcher in watchers))


class _UseWatcher(TorchDispatchMode):
    """Notes the weights that any operation uses, also one that is not called from Python."""

    def __init__(self, operands: Operands):
        super().__init__()
        self.used: set[str] = set()
        self._operands = operands

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.used |= {weight.name for weight in self._operands.touched(list(tensors_in(args, kwargs)))}
        return func(*args, **kwargs)


def _unseen(model_layers: ModelLayers, visited: set[int], seen: set[str], hidden: dict[str, str]) -> dict[str, str]:
    """Returns the unseen layers and the reasons."""
    parameters = {weight.parameter for name, weight in model_layers.weights.items() if name in seen}
    unseen: dict[str, str] = {}
    for index, block in enumerate(model_layers.blocks):
        for name, weight in block.weights.items():
            if index not in visited:
                outside = name in seen or name in hidden
                unseen[name] = OUTSIDE if outside else NOT_USED
            elif name in hidden and name not in seen:
                unseen[name] = hidden_reason(hidden[name])
            elif weight.parameter not in parameters and not _is_one_of_many_experts(weight):
                unseen[name] = NOT_USED
    return unseen


def _is_one_of_many_experts(weight: Weight) -> bool:
    """Returns whether a layer is an expert with a module of its own, which a single sequence may well not reach."""
    return any("experts" in part for part in weight.name.split(".")[:-1]) and weight.expert is None


def _check_finite(output: Any) -> None:
    """Raises ValueError when the first tensor of a model's output is NaN or infinite."""
    first = output if isinstance(output, Tensor) else output[0]
    if isinstance(first, Tensor) and not torch.isfinite(first).all():
        raise ValueError(
            f"the model's output is NaN or infinite on the calibration data in {first.dtype}: "
            "load it in bfloat16 or float32, or check the checkpoint"
        )
