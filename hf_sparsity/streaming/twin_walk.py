"""Two walks of each batch side by side: behind the pruned blocks and behind the dense ones, for reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.inference import Batch
from .forward import padding
from .lockstep import Arrival
from .spill import Spill

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class TwinWalk:
    """The walks of the batches at one block: behind the pruned blocks and, beside it, behind the dense ones.

    A batch has the same number in both walks, from 0 to `count - 1`; `_numbers`: its number among all batches.
    """

    _numbers: Sequence[int]
    _batches: Sequence[Batch]
    _arrival: Arrival
    _spill: Spill | None
    _keep: Callable[[int, Any], None] | None
    _of_text: bool = True

    @property
    def count(self) -> int:
        """Number of batches at the block."""
        return len(self._numbers)

    def call(self, number: int) -> Call:
        """Returns the arguments that a batch brings from the pruned blocks."""
        number = self._numbers[number]
        if self._spill:
            self._spill.fetch(number)
        args, kwargs = self.lasting(self._arrival.calls[number])
        if self._spill:
            self._spill.rest(number)
        return args, kwargs

    def lasting(self, value: Any) -> Any:
        """Returns nested arguments that may be kept after the block has run; copied if their memory may be emptied."""
        if isinstance(value, Tensor):
            return value.detach().clone() if self._spill else value.detach()
        if type(value) in (tuple, list):
            return type(value)(map(self.lasting, value))
        return {key: self.lasting(item) for key, item in value.items()} if type(value) is dict else value

    def pruned(self, number: int) -> Any:
        """Returns the block's output on what the pruned blocks gave; the batch waits on, also after an error."""
        number = self._numbers[number]
        try:
            return self._arrival.run(number, stay=False)
        finally:
            if self._spill:
                self._spill.rest(number)

    def dense(self, number: int) -> tuple[Call, Any]:
        """Returns (arguments, the block's output) behind the dense blocks, and lets the batch's dense walk go on.

        To be called once for each batch, while the block is still dense.
        """
        number = self._numbers[number] + len(self._batches)
        args, kwargs = self._arrival.calls[number]
        output = self._arrival.run(number, stay=False)
        call, kept = self.lasting((args, kwargs)), self.lasting(output)
        if self._keep:
            self._keep(number, output)
        self._arrival.finish(number, output)
        return call, kept

    def hold(self, what: str, number: int, value: Any) -> None:
        """Lets tensors recorded of a batch wait as its inputs do: beyond the memory limit on disk, except while `lent`.

        The tensors must be copies of their own, see `lasting`; `drop` them when they are not needed any more.
        """
        if self._spill:
            self._spill.arrive((what, number), value)

    @contextmanager
    def lent(self, what: str, number: int) -> Iterator[None]:
        """Keeps in memory inside what is held under this name of a batch."""
        if self._spill:
            self._spill.fetch((what, number))
        yield
        if self._spill:
            self._spill.rest((what, number))

    def drop(self, what: str) -> None:
        """Forgets what is held under this name of all batches."""
        for number in range(self.count) if self._spill else ():
            assert self._spill is not None
            self._spill.drop((what, number))

    def real(self, number: int, shape: torch.Size) -> Tensor | None:
        """Returns where an output of this shape belongs to tokens that are not padding, `[sequences, tokens]`.

        None: everywhere.
        """
        number = self._numbers[number]
        masks = padding(self._batches[number], self._arrival.arguments(number), of_text=self._of_text)[2]
        return next((mask for mask in masks if mask.shape == shape[:2]), None)
