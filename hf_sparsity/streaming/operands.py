"""Recognise the prunable weights of a block among the tensors of a computation, by their place in memory.

A place is a storage with an offset, a shape and strides. So several weights may be views of one tensor (a fused weight
split up, a flat buffer), and a weight is known in a view of it: transposed, an expert of many, a piece of its rows.
Copies of a weight (`weight.float()`, `weight.t().contiguous()`) are recognised once they were made known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model.layers import Weight


@dataclass(frozen=True)
class Shown:
    """What an operand shows: `weights`, in order; `exchanged`: whether with the last two stored dimensions exchanged.

    `several`: whether the operand is a batch of matrices, one for each of the weights.
    """

    weights: list[Weight]
    exchanged: bool
    several: bool


@dataclass(frozen=True)
class _Place:
    """The place of a parameter, or of a copy of one, in its storage.

    `exchanged`: whether its last two dimensions are those of the parameter exchanged.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    weights: list[Weight]
    exchanged: bool = False

    @classmethod
    def of(cls, tensor: Tensor, weights: list[Weight], exchanged: bool = False) -> _Place:
        """Returns the place of a tensor of two or three dimensions that holds these weights."""
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()), weights, exchanged)

    @property
    def extent(self) -> tuple[int, int]:
        """The first offset in the storage, and the one after the last."""
        return _extent(self.offset, self.shape, self.strides)

    def index(self, offset: int) -> tuple[int, ...] | None:
        """Returns the index of the element at this offset of the storage, or None if it is not one of this tensor's."""
        left = offset - self.offset
        index = [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            if self.shape[axis] > 1 and self.strides[axis]:
                index[axis] = min(left // self.strides[axis], self.shape[axis] - 1)
                left -= index[axis] * self.strides[axis]
            if left < 0:
                return None
        return None if left else tuple(index)

    def show(self, operand: Tensor) -> Shown | None:
        """Returns what an operand that lies in this storage shows of this place; None if no whole rows or columns."""
        index = self.index(int(operand.storage_offset()))
        if index is None:
            return None
        axes = [axis for axis in range(operand.ndim - 2) if operand.shape[axis] > 1 and operand.stride(axis)]
        rows, columns = self.shape[-2:]
        matrix = tuple(operand.shape[-2:])
        if _fits(matrix, operand.stride()[-2:], (rows, columns), self.strides[-2:]):
            exchanged = False
        elif _fits(matrix, operand.stride()[-2:], (columns, rows), self.strides[:-3:-1]):
            exchanged = True
        else:
            return None
        if len(self.shape) == 2:
            return None if axes else Shown(self.weights, exchanged != self.exchanged, several=False)
        if len(axes) > 1 or (axes and operand.stride(axes[0]) % self.strides[0]):
            return None
        count = operand.shape[axes[0]] if axes else 1
        step = operand.stride(axes[0]) // self.strides[0] if axes else 1
        experts = {index[0] + i * step for i in range(count)}
        several = operand.ndim == 3 and operand.stride(0) != 0
        return Shown([w for w in self.weights if w.expert in experts], exchanged != self.exchanged, several)


def _fits(
    shape: tuple[int, ...], strides: tuple[int, ...], whole: tuple[int, ...], whole_strides: tuple[int, ...]
) -> bool:
    """Returns whether a matrix of this shape and these strides is `whole` rows or columns of another."""
    same = all(n == 1 or s == t for n, s, t in zip(shape, strides, whole_strides, strict=True))
    return same and shape[0] <= whole[0] and shape[1] <= whole[1] and (shape[0] == whole[0] or shape[1] == whole[1])


class Operands:
    """Recognises the prunable weights of one block, or of several, while they are on their device."""

    def __init__(self, weights: Iterable[Weight]):
        by_parameter: dict[tuple[int, str], list[Weight]] = {}
        for weight in weights:
            by_parameter.setdefault((id(weight.module), weight.attribute), []).append(weight)
        self.count = sum(map(len, by_parameter.values()))
        self.routed = any(w.expert is not None for group in by_parameter.values() for w in group)
        self._places: dict[int, list[_Place]] = {}
        self._copies: dict[int, list[_Place]] = {}
        self._held: list[Tensor] = []  # the copies: while they live, no other tensor gets their memory
        for group in by_parameter.values():
            parameter = group[0].used
            if (storage := storage_address(parameter)) is not None:
                self._places.setdefault(storage, []).append(_Place.of(parameter, group))

    def find(self, operand: Any) -> Shown | None:
        """Returns what a factor of a product shows of the weights, or None."""
        if not isinstance(operand, Tensor) or operand.ndim < 2 or not (places := self._near(operand)):
            return None
        return next((shown for place in places if (shown := place.show(operand)) is not None), None)

    def touched(self, value: Any) -> list[Weight]:
        """Returns the weights in whose memory a tensor, or one of several, lies."""
        if isinstance(value, (list, tuple)):
            return [weight for item in value for weight in self.touched(item)]
        if not isinstance(value, Tensor):
            return []
        start, end = _extent(int(value.storage_offset()), value.shape, value.stride())
        return [
            weight
            for place in self._near(value)
            if place.extent[0] < end and start < place.extent[1]
            for weight in place.weights
        ]

    def add_copy(self, original: Tensor, copy: Any) -> bool:
        """Makes known that `copy` holds the values of `original`, perhaps scaled; returns whether that was possible."""
        if not isinstance(copy, Tensor) or copy.shape != original.shape or copy.ndim not in (2, 3):
            return False
        shown, storage = self.find(original), storage_address(copy)
        if shown is None or storage is None or (copy.ndim == 3) != shown.several:
            return False
        if shown.several and [weight.expert for weight in shown.weights] != list(range(len(copy))):
            return False
        whole = {
            weight.shape[::-1] if weight.transposed != shown.exchanged else weight.shape for weight in shown.weights
        }
        if whole != {tuple(copy.shape[-2:])}:
            return False
        if storage not in self._places:
            self._held.append(copy)
            self._copies.setdefault(storage, []).append(_Place.of(copy, shown.weights, shown.exchanged))
        return True

    def forget_copies(self) -> None:
        """Lets go of all copies."""
        self._copies.clear()
        self._held.clear()

    def _near(self, tensor: Tensor) -> list[_Place]:
        """Returns the places in the storage of a tensor."""
        storage = storage_address(tensor) if self._places else None
        return [] if storage is None else self._places.get(storage) or self._copies.get(storage, [])


def _extent(offset: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Returns the first offset of a tensor in its storage, and the one after the last."""
    return offset, offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1


def storage_address(tensor: Tensor) -> int | None:
    """Returns the address of a tensor's storage; None for a tensor without memory."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, nested, fake
        return None


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors among the arguments of a function, also those in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))
