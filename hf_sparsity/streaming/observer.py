"""See every product of an activation with a prunable weight, and name the weights whose products cannot be seen.

Hooks on modules miss what bypasses a module's call: fused experts, `x @ weight.T`, a layer whose weight is read
directly. A `TorchFunctionMode` sees the products themselves. Any other function that is given a prunable weight
(`einsum`, a fused attention call, `weight.float()`) is run under a `TorchDispatchMode`, which sees the products and
copies inside it; a weight that goes into anything else is noted, with the function's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.stats import InputStats
from ..model.layers import Weight
from .operands import Operands, storage_address, tensors_in

_LINEAR = {F.linear}
_MATMUL = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
}
_ADD_MATMUL = {torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm}
PRODUCTS = _LINEAR | _MATMUL | _ADD_MATMUL

_aten = torch.ops.aten
# Products inside other functions -> the position of their first factor.
_INNER_PRODUCTS = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.mv.default: 0,
    _aten.addmm.default: 1,
    _aten.addmv.default: 1,
    _aten.baddbmm.default: 1,
}
# The values of a copy are the weight's, perhaps in another dtype or scaled: an input of the one is an input of the other.
_COPIES = {
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.contiguous.default,
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.div.Tensor,
    _aten.div.Scalar,
}


class Enough(BaseException):
    """Ends a block's forward whose output is not needed; not an Exception, so that no model code swallows it."""


class InputObserver(TorchFunctionMode):
    """Calls `on(weight, inputs, in_order)` for each product with a prunable weight, `inputs` as `[..., tokens, in]`.

    `in_order`: whether `inputs` are the model's own tensor; inside another function tokens may have changed places.
    Raises `Enough` instead of computing the product with the weight named `last`. `hidden`: layer -> the function
    that used its weight in another way than in a product that can be seen.
    """

    def __init__(self, operands: Operands, on: Callable[[Weight, Tensor, bool], None], last: str | None = None):
        super().__init__()
        self.operands = operands
        self.on = on
        self.last = last
        self.hidden: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            left, right = product_operands(func, args, kwargs)
            self.look(left, right, func, linear=func in _LINEAR)
            return func(*args, **kwargs)
        if not self.operands.touched(list(tensors_in(args, kwargs))):
            return func(*args, **kwargs)
        with _Inside(self, func):
            return func(*args, **kwargs)

    def look(self, left: Any, right: Any, func: Any, *, linear: bool = False, in_order: bool = True) -> None:
        """Reports the inputs of a product `left @ right` (`left @ right.T` if `linear`) to `on`."""
        if (shown := self.operands.find(right)) is not None:
            inputs, operand, contracted = left, right, -1 if linear else -2
        elif (shown := self.operands.find(left)) is not None:
            inputs, operand, contracted = right.transpose(-1, -2) if right.ndim > 1 else right, left, -1
        else:
            self.hide([left, right], func)
            return
        if shown.exchanged:
            contracted = -3 - contracted
        for weight in shown.weights:  # contracted: the stored dimension that is summed over, so "in"
            if (contracted == -2) != weight.transposed:
                raise RuntimeError(
                    f"{weight.name} is stored {'[out, in]' if weight.transposed else '[in, out]'}, not as its module says; please report this"
                )
        for number, weight in enumerate(shown.weights):
            own = inputs[number] if shown.several else inputs
            if own.shape[-1] != weight.shape[1]:
                self.hide([operand], func)
                return
            self.on(weight, own, in_order)
            if weight.name == self.last and not shown.several:
                raise Enough

    def hide(self, tensors: Sequence[Any], func: Any) -> None:
        """Notes that a function uses the weights in these tensors in a way in which their inputs cannot be seen."""
        for weight in self.operands.touched(list(tensors)):
            self.hidden.setdefault(weight.name, function_name(func))


class _Inside(TorchDispatchMode):
    """Sees the products and copies inside a function that is no product itself."""

    def __init__(self, observer: InputObserver, func: Any):
        super().__init__()
        self.observer = observer
        self.func = func

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        operands = self.observer.operands
        if func in _INNER_PRODUCTS:
            first = _INNER_PRODUCTS[func]
            self.observer.look(args[first], args[first + 1], self.func, in_order=False)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        shown = [tensor for tensor in tensors_in(args, kwargs) if operands.touched(tensor)]
        is_copy = func in _COPIES and len(shown) == 1 and (shown[0] is args[0] or func is _aten.mul.Tensor)
        is_copy = is_copy and operands.add_copy(shown[0], result)
        if shown and not is_copy and not _is_view(result, shown):
            self.observer.hide(shown, self.func)
        return result


def _is_view(result: Any, sources: Sequence[Tensor]) -> bool:
    """Returns whether a result, or each of several, lies in the memory of one of these tensors, or is no tensor."""
    storages = {storage_address(tensor) for tensor in sources}
    return all(storage_address(tensor) in storages for tensor in tensors_in([result], {}))


def function_name(func: Any) -> str:
    """Returns the name under which torch documents a function, such as `torch.einsum`."""
    return resolve_name(func) or getattr(func, "__qualname__", repr(func))


def product_operands(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the two factors of a product in `PRODUCTS`, whether given by position or by name."""
    if func in _LINEAR:
        names, skip = ("input", "weight"), 0
    elif func in _ADD_MATMUL:
        names, skip = ("mat1" if func in (torch.addmm, torch.Tensor.addmm) else "batch1", "mat2"), 1
        if names[0] == "batch1":
            names = ("batch1", "batch2")
    else:
        names, skip = ("input", "other"), 0
    factors = list(args[skip : skip + 2])
    if func is torch.Tensor.__rmatmul__:
        return factors[1], factors[0]
    if len(factors) < 2:
        second = kwargs.get(names[1], kwargs.get("mat2"))
        factors = [*factors, second] if factors else [kwargs.get(names[0], kwargs.get("self")), second]
    return factors[0], factors[1]


class Collector:
    """Fills one `InputStats` per input tensor; layers fed by the same tensor share it.

    Use `with collector.observe(...)` around each batch's forward, then `finish`. `stats`: by layer. `unseen`: layers
    without statistics whose inputs could not be observed -> the reason.
    """

    def __init__(self, operands: Operands, needs: frozenset[str]):
        self.needs = needs
        self.stats: dict[str, InputStats] = {}
        self.unseen: dict[str, str] = {}
        self.operands = operands
        self._leader: dict[str, str] = {}
        self._forward = 0
        self._formed: dict[str, int] = {}
        self._seen: list[tuple[Tensor, str]] = []
        self._order: list[str] = []
        self._done: dict[str, int] = {}  # layer -> how many sequences of the batch it has seen
        self._seen_before: dict[str, int] = {}  # the same, when the forward began
        self._stop = 0
        self._masks: Sequence[Tensor] = ()
        self._sequences, self._length = 1, 0
        self._observer: InputObserver | None = None

    @property
    def last(self) -> str | None:
        """The layer after whose input a forward has nothing more to show, known after the first batch.

        None where it could differ between batches: with experts, or a weight used twice.
        """
        fixed = len(set(self._order)) == len(self._order) == self.operands.count and not self.operands.routed
        return self._order[-1] if fixed else None

    def begin_batch(self) -> None:
        """Begins a batch, whose sequences the next calls of `observe` count from 0."""
        self._done.clear()

    def observe(
        self, part: slice, *, length: int = 0, masks: Sequence[Tensor] = (), whole: bool = True
    ) -> InputObserver:
        """Returns a mode to run a forward under; unless the `whole` output is wanted it may end early, by `Enough`.

        Args:
            part: which sequences of the batch the forward is about. Of a layer that has seen them, because a forward
                before was broken off, they do not count again.
            length: number of tokens of each sequence.
            masks: given only when there is padding: boolean `[sequences, tokens]`, True = real, tried in order against
                the shape of an input.
        """
        last = None if whole or self._forward == 0 else self.last
        self._forward += 1
        self._end_forward()
        self._masks, self._sequences, self._length = masks, part.stop - part.start, length
        self._stop, self._seen_before = part.stop, dict(self._done)
        self._observer = InputObserver(self.operands, self._add, last)
        return self._observer

    def _end_forward(self) -> None:
        """Lets go of the tensors of the forward before, and notes what it hid."""
        self._seen.clear()
        self.operands.forget_copies()
        if self._observer is not None:
            reasons = {name: hidden_reason(func) for name, func in self._observer.hidden.items()}
            self.unseen = reasons | self.unseen
            self._observer = None

    def finish(self, sequences: int) -> None:
        """Ends the collection after `sequences` sequences in all, and lets go of the inputs."""
        self._end_forward()
        self.unseen = {name: reason for name, reason in self.unseen.items() if name not in self.stats}
        for stats in {id(s): s for s in self.stats.values()}.values():
            stats.close(sequences)

    def _add(self, weight: Weight, inputs: Tensor, in_order: bool) -> None:
        """Adds the inputs of one product to the statistics of a layer, unless a layer with the same inputs has done so."""
        name = weight.name
        if self._forward == 1:
            self._order.append(name)
        # Inputs of this forward are held until it ends, so that an address means one tensor.
        for seen, leader in self._seen:
            if seen.data_ptr() == inputs.data_ptr() and seen.shape == inputs.shape and seen.stride() == inputs.stride():
                if name not in self._leader and self._formed[leader] == self._forward:
                    self._leader[name], self.stats[name] = leader, self.stats[leader]
                if self._leader.get(name) == leader:
                    return
        if not in_order and self._masks and self._sequences > 1:
            self.unseen[name] = "among its inputs padding cannot be told from tokens; give batches of one sequence"
            return
        leader = self._leader.setdefault(name, name)
        if leader != name:
            raise RuntimeError(
                f"{name} and {leader} shared their input in one calibration batch but not in another; please report this"
            )
        if name not in self.stats:
            self.stats[name] = InputStats(self.needs)
            self._formed[name] = self._forward
        self._seen.append((inputs, name))
        if self._seen_before.get(name, 0) >= self._stop:
            self._formed[name] = self._forward
            return
        rows, last = self._real_tokens(name, inputs)
        self.stats[name].add(rows, sequences=self._sequences, last=last)
        self._done[name] = self._stop

    def _real_tokens(self, name: str, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns (tokens `[n, in]` without padding, rows that end a sequence or None where they cannot be known)."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        for mask in self._masks:
            if inputs.shape[:-1] == mask.shape or (len(flat) == mask.numel() and inputs.shape[:-1] != mask.T.shape):
                kept = mask.to(inputs.device)
                return flat[kept.reshape(-1)], kept.sum(dim=1).cumsum(dim=0) - 1
            if inputs.shape[:-1] == mask.T.shape:  # tokens first
                return flat[mask.T.to(inputs.device).reshape(-1)], None
        if self._masks and inputs.ndim == 2:
            raise ValueError(
                f"{name} is fed by routed tokens, among which padding cannot be told: give batches without padding"
            )
        by_sequence = inputs.ndim == 3 and inputs.shape[0] == self._sequences
        length = inputs.shape[1] if by_sequence else self._length
        if by_sequence or flat.shape[0] == self._sequences * length:
            return flat, torch.arange(1, self._sequences + 1, device=flat.device) * length - 1
        return flat, None


def hidden_reason(func: str) -> str:
    """Returns why the inputs of a layer could not be observed whose weight went into a function of this name."""
    return f"its weight is used inside {func}, where inputs cannot be observed"
