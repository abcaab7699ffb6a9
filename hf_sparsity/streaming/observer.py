"""See every product of an activation with a registered parameter.

Hooks on modules miss what bypasses a module's call: fused experts, `x @ weight.T`, a layer whose
weight is read directly. A `TorchFunctionMode` sees the products themselves. The weight operand is
recognised by its storage, the expert by its offset in it, the orientation by its strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.stats import InputStats
from ..model.layers import Weight

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


class Operands:
    """Recognises the prunable weights of one block among the operands of a product."""

    def __init__(self, weights: Iterable[Weight]):
        self._by_parameter: dict[tuple[int, str], list[Weight]] = {}
        self._modules: dict[int, Any] = {}
        for weight in weights:
            key = (id(weight.module), weight.attribute)
            self._by_parameter.setdefault(key, []).append(weight)
            self._modules[id(weight.module)] = weight.module
        self.count = sum(map(len, self._by_parameter.values()))
        self.routed = any(w.expert is not None for ws in self._by_parameter.values() for w in ws)
        self._by_storage: dict[int, tuple[int, str]] = {}
        for key in self._by_parameter:
            parameter = self._modules[key[0]]._parameters[key[1]]
            self._by_storage[parameter.untyped_storage().data_ptr()] = key

    def find(self, operand: Any) -> tuple[Tensor, list[Weight]] | None:
        """(the parameter, its weights that the operand shows in order) or None."""
        if not isinstance(operand, Tensor) or operand.ndim < 2:
            return None
        key = self._by_storage.get(operand.untyped_storage().data_ptr())
        if key is None:
            return None
        parameter = self._modules[key[0]]._parameters[key[1]]
        weights = self._by_parameter[key]
        if parameter.ndim == 2:
            return parameter, weights
        first = (operand.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        count = operand.shape[0] if operand.ndim == 3 else 1
        chosen = set(range(first, first + count))
        return parameter, [w for w in weights if w.expert in chosen]


def shown_transposed(operand: Tensor, parameter: Tensor) -> bool:
    """Returns whether the product saw the parameter's last two dimensions exchanged."""
    return operand.stride()[-2:] != parameter.stride()[-2:]


class Enough(BaseException):
    """Ends a block's forward whose output nobody wants; not an Exception, so that no model code swallows it."""


class InputObserver(TorchFunctionMode):
    """Calls `on(weight, inputs)` for each product with a prunable weight, `inputs` as `[..., tokens, in]`.

    Raises `Enough` instead of computing the product with the weight named `last`.
    """

    def __init__(self, operands: Operands, on: Callable[[Weight, Tensor], None], last: str | None = None):
        super().__init__()
        self.operands = operands
        self.on = on
        self.last = last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        left, right = product_operands(func, args, kwargs)
        if (hit := self.operands.find(right)) is not None:
            inputs, contracted = left, -1 if func in _LINEAR else -2
        elif (hit := self.operands.find(left)) is not None:
            inputs, contracted = right.transpose(-1, -2) if right.ndim > 1 else right, -1
        else:
            return
        operand = right if inputs is left else left
        parameter, weights = hit
        if shown_transposed(operand, parameter):
            contracted = -3 - contracted
        for weight in weights:  # contracted: the stored dimension that is summed over, so "in"
            if (contracted == -2) != weight.transposed:
                raise RuntimeError(
                    f"{weight.name} is stored {'[out, in]' if weight.transposed else '[in, out]'}, not as its module says; please report this"
                )
        if operand.ndim == 3 and parameter.ndim == 3:  # all experts in one batched product
            for weight, one in zip(weights, inputs, strict=True):
                self.on(weight, one)
        else:
            for weight in weights:
                self.on(weight, inputs)
                if weight.name == self.last:
                    raise Enough


def product_operands(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two factors of a product in `PRODUCTS`, whether given by position or by name."""
    if func in _LINEAR:
        names, skip = ("input", "weight"), 0
    elif func in _ADD_MATMUL:
        names, skip = ("mat1" if func in (torch.addmm, torch.Tensor.addmm) else "batch1", "mat2"), 1
        if names[0] == "batch1":
            names = ("batch1", "batch2")
    else:
        names, skip = ("input", "other"), 0
    given = list(args[skip : skip + 2])
    if func is torch.Tensor.__rmatmul__:
        return given[1], given[0]
    if len(given) < 2:
        second = kwargs.get(names[1], kwargs.get("mat2"))
        given = [*given, second] if given else [kwargs.get(names[0], kwargs.get("self")), second]
    return given[0], given[1]


class Collector:
    """Fills one `InputStats` per input tensor; layers fed by the same tensor share it.

    Use `with collector.observe(...)` around each batch's forward, then `finish`.
    """

    def __init__(self, operands: Operands, needs: frozenset[str]):
        self.needs = needs
        self.stats: dict[str, InputStats] = {}
        self.operands = operands
        self._leader: dict[str, str] = {}
        self._forward = 0
        self._formed: dict[str, int] = {}
        self._seen: list[tuple[Tensor, str]] = []
        self._order: list[str] = []
        self._masks: Sequence[Tensor] = ()
        self._sequences, self._length = 1, 0

    @property
    def last(self) -> str | None:
        """The layer after whose input a forward has nothing more to show, known after the first batch.

        None where it could differ between batches: with experts, or a weight used twice.
        """
        fixed = len(set(self._order)) == len(self._order) == self.operands.count and not self.operands.routed
        return self._order[-1] if fixed else None

    def observe(
        self, *, sequences: int, length: int = 0, masks: Sequence[Tensor] = (), whole: bool = True
    ) -> InputObserver:
        """A mode to run one batch's forward under; unless the `whole` output is wanted it may end early, by `Enough`.

        `length` is the tokens of each of the `sequences`. `masks`, given only when there is padding, are
        boolean `[sequences, tokens]`, True = real, tried in order against the shape of an input.
        """
        last = None if whole or self._forward == 0 else self.last
        self._forward += 1
        self._seen.clear()
        self._masks, self._sequences, self._length = masks, sequences, length
        return InputObserver(self.operands, self._add, last)

    def finish(self, sequences: int) -> None:
        """Ends the collection after `sequences` sequences in all, and lets go of the inputs."""
        self._seen.clear()
        for stats in {id(s): s for s in self.stats.values()}.values():
            stats.close(sequences)

    def _add(self, weight: Weight, inputs: Tensor) -> None:
        name = weight.name
        if self._forward == 1:
            self._order.append(name)
        # Inputs of this forward are held until it ends, so that an address means one tensor.
        for seen, leader in self._seen:
            if seen.data_ptr() == inputs.data_ptr() and seen.shape == inputs.shape and seen.stride() == inputs.stride():
                if name not in self._leader and self._formed[leader] == self._forward:
                    self._leader[name], self.stats[name] = leader, self.stats[leader]
                if self._leader.get(name) == leader and name != leader:
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
        rows, last = self._real_tokens(name, inputs)
        self.stats[name].add(rows, sequences=self._sequences, last=last)

    def _real_tokens(self, name: str, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens `[n, in]` without padding, rows that end a sequence or None where they cannot be known)."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        for mask in self._masks:
            if inputs.shape[:-1] == mask.shape or (inputs.ndim == 2 and flat.shape[0] == mask.numel()):
                kept = mask.to(inputs.device)
                return flat[kept.reshape(-1)], kept.sum(dim=1).cumsum(dim=0) - 1
        if self._masks and inputs.ndim == 2:
            raise ValueError(
                f"{name} is fed by routed tokens, among which padding cannot be told: give batches without padding"
            )
        by_sequence = inputs.ndim == 3 and inputs.shape[0] == self._sequences
        length = inputs.shape[1] if by_sequence else self._length
        if by_sequence or flat.shape[0] == self._sequences * length:
            return flat, torch.arange(1, self._sequences + 1, device=flat.device) * length - 1
        return flat, None
