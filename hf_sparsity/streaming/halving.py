"""What is done when an accelerator is full: others make room, then a block runs on parts of a batch, then there is advice.

Sequences do not depend on each other, so a block's outputs on the parts of a batch, joined, are those on the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..model.devices import empty_caches

logger = logging.getLogger(__name__)

ADVICE = (
    "the device is full, and neither moving the hidden states of waiting batches to the host nor halving the batches was "
    "enough. Give shorter sequences or fewer of them in a batch; stream the model onto the device block by block "
    "(offload='stream', --stream); spread it over several devices (device_map='auto', --device-map auto); or use a pruner "
    "that needs no Gram matrix, such as 'wanda'"
)

Around = Callable[[slice], AbstractContextManager[Any]]  # a part of a batch's sequences -> what to run it under


@contextmanager
def advising() -> Iterator[None]:
    """Lets torch.OutOfMemoryError say what can be done."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if ADVICE in str(error):
            raise
        raise torch.OutOfMemoryError(f"{error}\n{ADVICE}") from error


class Whole(Exception):
    """Raised when a call cannot be cut into sequences."""


@dataclass
class Halving:
    """Runs calls of blocks on whole batches, or on `parts` of them each, once the device was too full for more.

    `make_room`: lets all batches but this one leave the devices; returns whether any did.
    """

    make_room: Callable[[int], bool] | None = None
    parts: int = 1

    def run(
        self,
        forward: Callable[..., Any],
        batch: int,
        call: Any,
        around: Around | None = None,
        sequences: int | None = None,
    ) -> Any:
        """Returns the output of `forward` for a batch.

        Args:
            forward: of a block.
            batch: its number, for `make_room`.
            call: the arguments, `(args, kwargs)`.
            around: what each part of the batch is run under; it may end the forward, whose output is None then.
            sequences: that `around` knows of; a call that has another number of them is not cut.

        Raises:
            torch.OutOfMemoryError: the device is full whatever was tried.
        """
        while True:
            try:
                return self._run(forward, call, around or (lambda part: nullcontext()), sequences)
            except torch.OutOfMemoryError as error:
                full = str(error)
            except Whole:
                full = "the output of a block cannot be joined from parts of a batch"
            # Only here, after the `except`, are the tensors of the attempt free.
            empty_caches(tensor.device for tensor in tree_flatten(call)[0] if isinstance(tensor, Tensor))
            if self.make_room is not None and self.make_room(batch):
                logger.warning("the device is full: from now on the hidden states of waiting batches wait on the host")
                continue
            if len(_parts(call, 2 * self.parts, sequences)) == len(_parts(call, self.parts, sequences)):
                raise torch.OutOfMemoryError(f"{full}\n{ADVICE}")
            self.parts *= 2
            logger.warning("the device is full: blocks run on 1/%d of a batch at a time", self.parts)

    def _run(self, forward: Callable[..., Any], call: Any, around: Around, sequences: int | None) -> Any:
        outputs = []
        parts = _parts(call, self.parts, sequences)
        for part in parts:
            args, kwargs = call if len(parts) == 1 else cut(call, part, parts[-1].stop)
            output = None
            with around(part):
                output = forward(*args, **kwargs)
            outputs.append(output)
        return outputs[0] if len(parts) == 1 else joined(outputs, [part.stop - part.start for part in parts])


def _parts(call: Any, count: int, sequences: int | None) -> list[slice]:
    """Returns the sequences of each of at most `count` parts of a call; all of them where it cannot be cut."""
    first = next((value for value in tree_flatten(call)[0] if isinstance(value, Tensor)), None)
    whole = 1 if first is None or first.ndim < 2 else len(first)
    if count == 1 or whole == 1 or (sequences is not None and whole != sequences):
        return [slice(0, whole if sequences is None else sequences)]
    try:
        cut(call, slice(0, 1), whole)
    except Whole:
        return [slice(0, whole)]
    ends = [whole * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


def cut(call: Any, part: slice, sequences: int) -> Any:
    """Returns the arguments of a call for some of its sequences; what all have in common stays whole.

    A tensor with as many rows as there are sequences is cut.

    Raises:
        Whole: a tensor of one axis that may or may not belong to the sequences, or an object that may hold some.
    """
    values, structure = tree_flatten(call)

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.ndim == 1 and len(value) == sequences:
                raise Whole
            return value[part] if value.ndim > 1 and len(value) == sequences else value
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise Whole

    return tree_unflatten([of(value) for value in values], structure)


def joined(outputs: Sequence[Any], counts: Sequence[int]) -> Any:
    """Returns one output from those on parts of a batch that have these numbers of sequences.

    Raises:
        Whole: an output that is not made of tensors with a row a sequence, and of what is the same for all parts.
    """
    flat = [tree_flatten(output) for output in outputs]
    columns = []
    for several in zip(*(values for values, _ in flat), strict=True):
        if not isinstance(several[0], Tensor):
            columns.append(several[0])
        elif all(value.ndim > 1 and len(value) == count for value, count in zip(several, counts, strict=True)):
            columns.append(torch.cat(several))
        else:
            raise Whole
    return tree_unflatten(columns, flat[0][1])
