"""The halves of a block: which modules they are, the outputs of the dense ones, the arguments of the pruned ones.

A half is a direct child of the block that holds prunable weights (attention, MLP). Nothing about an architecture is
assumed: on the first batch each child is called again by itself and must give the same output; and it is tried whether
the block's output is its input plus the outputs of its halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..model.layers import Block, Weight
from ..streaming.observer import Enough
from ..streaming.twin_walk import Call, TwinWalk

DENSE, HALF = "dense", "half"  # names of what is recorded of a batch: of the dense block; of the half that is trained
CLOSE = 0.02  # relative difference up to which two tensors in half precision count as equal


@dataclass(frozen=True)
class HalfBlock:
    """A module whose weights are trained together.

    `weights`: those of each parameter, by its name in the module. `whole`: whether the module is the block itself.
    """

    name: str
    module: nn.Module
    weights: dict[str, list[Weight]]
    whole: bool = False

    @property
    def zeros(self) -> int:
        """Number of zeros among its weights."""
        return sum(int((w.read() == 0).sum()) for weights in self.weights.values() for w in weights)


@dataclass
class DenseOutputs:
    """What the dense block computed.

    `adds`: whether the block's output is its input plus the outputs of its halves. `before`: for each batch the
    residual stream before the block, None unless `adds`. `outputs`: for each batch the output of each half.
    """

    halves: list[HalfBlock]
    adds: bool
    before: list[Tensor | None] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)

    def energy(self, index: int, number: int, real: Tensor | None) -> float:
        """Returns the summed squares of the target of half `index` on a batch: the stream behind it, or its output."""
        parts = (
            [self.before[number], *self.outputs[number][: index + 1]] if self.adds else [self.outputs[number][index]]
        )
        total = torch.zeros((), device=self.outputs[number][index].device)
        for part in parts:
            assert part is not None
            total = total + part.to(total.device, torch.float32)
        return float(energy(total, real))


@dataclass
class Example:
    """One batch at one half: `call`, its arguments; `target`, the output wanted; `real`, the tokens that count.

    `real` is None where all tokens count. `call` and `target` may be read only inside `lent()`: in between they may
    wait on disk.
    """

    call: Call
    target: Tensor
    real: Tensor | None
    lent: Callable[[], AbstractContextManager[None]]

    def error(self, half: HalfBlock, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the summed squared difference from the target, float32."""
        output = _first(functional_call(half.module, dict(parameters), *self.call))
        assert output is not None
        return energy(output.to(torch.float32) - self.target.to(output.device, torch.float32), self.real)


@torch.no_grad()
def observe(twins: TwinWalk, block: Block) -> DenseOutputs:
    """Runs the dense block behind the dense blocks, lets those walks go on, and returns what it computed."""
    dense = _separate(twins, block)
    for number in range(twins.count):
        with _watching(twins, dense.halves) as seen:
            call, output = twins.dense(number)
        dense.before.append(_stream(call) if dense.adds else None)
        outputs = [_first(output)] if dense.halves[0].whole else [seen[half.name][0][1] for half in dense.halves]
        if any(tensor is None for tensor in outputs):
            raise ValueError(f"{block.name} returns no tensor: it cannot be reconstructed")
        dense.outputs.append([tensor for tensor in outputs if tensor is not None])
        twins.hold(DENSE, number, [dense.before[number], dense.outputs[number]])
    return dense


def _separate(twins: TwinWalk, block: Block) -> DenseOutputs:
    """Returns the block's halves in the order in which they run, tried on the first batch; else the block as a whole."""
    halves = _children(block)
    if halves is not None:
        arguments = twins.call(0)
        with _watching(twins, halves) as seen:
            output = _first(twins.pruned(0))
        if all(len(seen.get(half.name, ())) == 1 and _replays(half, seen[half.name][0]) for half in halves):
            halves = sorted(halves, key=lambda half: list(seen).index(half.name))  # as they run
            return DenseOutputs(halves, adds(_stream(arguments), [seen[half.name][0][1] for half in halves], output))
    whole = HalfBlock("block", block.module, _inside(block.module, block.weights.values()), whole=True)
    return DenseOutputs([whole], adds=False)


def _children(block: Block) -> list[HalfBlock] | None:
    """Returns the children with weights; None when a child is itself a weight's module, or weights belong to no child."""
    children: dict[str, nn.Module] = {}
    for name, child in block.module.named_children():
        many = isinstance(child, (nn.ModuleList, nn.ModuleDict))  # such a list is not called: its members are
        children |= {f"{name}.{key}": member for key, member in child.named_children()} if many else {name: child}
    halves = [HalfBlock(name, child, _inside(child, block.weights.values())) for name, child in children.items()]
    halves = [half for half in halves if half.weights]
    covered = sum(len(weights) for half in halves for weights in half.weights.values())
    single = any("." not in name for half in halves for name in half.weights)
    return None if single or covered != len(block.weights) else halves


def _inside(module: nn.Module, weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Returns the weights that belong to a module, by the parameter's name in it."""
    names = {id(owner): path for path, owner in module.named_modules()}
    inside: dict[str, list[Weight]] = {}
    for weight in weights:
        if (path := names.get(id(weight.module))) is not None:
            inside.setdefault(f"{path}.{weight.attribute}".lstrip("."), []).append(weight)
    return inside


def _replays(half: HalfBlock, seen: tuple[Call, Tensor | None]) -> bool:
    """Returns whether the half, called alone with the same arguments, gives the same output again."""
    (args, kwargs), output = seen
    if output is None:
        return False
    again = _first(half.module(*args, **kwargs))
    return again is not None and _close(again, output)


def adds(stream: Tensor | None, outputs: Sequence[Tensor | None], output: Tensor | None) -> bool:
    """Returns whether a block adds its halves' outputs to the residual stream."""
    if stream is None or output is None or any(part is None or part.shape != stream.shape for part in outputs):
        return False
    total, output = stream.to(torch.float32), output.to(stream.device)
    for part in outputs:
        assert part is not None
        total = total + part.to(total.device, torch.float32)
    change = (total - stream.to(torch.float32)).norm()
    rounding = torch.finfo(output.dtype).eps * total.norm()  # a large stream hides what is added to it
    return bool((output.to(torch.float32) - total).norm() <= CLOSE * change + rounding)


@torch.no_grad()
def example(twins: TwinWalk, dense: DenseOutputs, index: int, number: int) -> Example:
    """Runs the block up to a half, behind the pruned blocks and trained halves, and returns the half's example."""
    half = dense.halves[index]
    with twins.lent(DENSE, number):
        target = twins.lasting(dense.outputs[number][index])
        call = twins.call(number)
        if not half.whole:
            with _watching(twins, dense.halves[:index], stop=half) as seen, suppress(Enough):
                twins.pruned(number)
            if dense.adds:
                here = [_stream(call), *(seen[earlier.name][0][1] for earlier in dense.halves[:index])]
                there = [dense.before[number], *dense.outputs[number][:index]]
                target = (target.to(torch.float32) + _difference(there, here, target.device)).to(target.dtype)
            call = seen[half.name][0][0]
    twins.hold(HALF, number, [call, target])
    return Example(call, target, twins.real(number, target.shape), partial(twins.lent, HALF, number))


def _difference(there: Sequence[Tensor | None], here: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Returns the first of two streams minus the second, float32, on a device.

    Each is given as its parts: what it was before the block, perhaps on another device, and all that was added to it.
    """
    total: Any = 0
    for theirs, ours in zip(there, here, strict=True):
        assert theirs is not None and ours is not None
        total = total + (theirs.to(device, torch.float32) - ours.to(device, torch.float32))
    return total


@contextmanager
def _watching(
    twins: TwinWalk, halves: Sequence[HalfBlock], stop: HalfBlock | None = None
) -> Iterator[dict[str, list[tuple[Call, Tensor | None]]]]:
    """Records the calls and outputs of halves, in order; at the call of `stop` the forward ends by raising `Enough`."""
    seen: dict[str, list[tuple[Call, Tensor | None]]] = {}

    def after(half: HalfBlock) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = _first(output)  # a copy: the block may add to it in place
            seen.setdefault(half.name, []).append(
                (twins.lasting((args, kwargs)), None if first is None else first.clone())
            )

        return hook

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        assert stop is not None
        seen[stop.name] = [(twins.lasting((args, kwargs)), None)]
        raise Enough

    hooks = [half.module.register_forward_hook(after(half), with_kwargs=True) for half in halves if not half.whole]
    if stop is not None:
        hooks.append(stop.module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first(output: Any) -> Tensor | None:
    """Returns a module's output, or the first of several; None if that is no tensor."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _stream(call: Call) -> Tensor | None:
    """Returns the first tensor that a block is called with: the residual stream."""
    args, kwargs = call
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def energy(difference: Tensor, real: Tensor | None) -> Tensor:
    """Returns the sum of squares over all tokens that are `real` (None: all), as a tensor without dimensions."""
    return (difference if real is None else difference[real.to(difference.device)]).square().sum()


def _close(one: Tensor, other: Tensor) -> bool:
    one, other = one.to(torch.float32), other.to(one.device, torch.float32)
    return one.shape == other.shape and bool((one - other).norm() <= CLOSE * other.norm())
