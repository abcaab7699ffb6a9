"""The inputs of the next block for every calibration batch, on disk, so that an interrupted run can go on at that block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..distributed import Processes
from .atomic import write_tensors


class HiddenStates:
    """What blocks gave to the next one: for each visit of a block a folder, in it a file for each batch.

    Each process stores those of its own batches. `next_visit`: the first visit whose outputs are not all stored, as far
    as the journal knows. `storable`: False once a block returned something that a file cannot hold.
    """

    def __init__(self, folder: Path, processes: Processes):
        self.folder = folder
        self.next_visit = 0
        self.storable = True
        self._processes = processes
        self._batches, self._first_batch = 0, 0

    def begin_pass(self, batches: int) -> None:
        """Begins a pass over a number of batches in this process."""
        counts = self._processes.gather(batches)
        self._batches, self._first_batch = batches, sum(counts[: self._processes.rank])

    @property
    def start(self) -> int:
        """The visit whose inputs are stored for all batches of this process; 0 if there is none."""
        last = self.next_visit - 1
        stored = last >= 0 and self._batches and all(self._file(last, i).exists() for i in range(self._batches))
        return self.next_visit if stored else 0

    def wants(self, visit: int) -> bool:
        """Returns whether the outputs of a visit are to be stored: not if later ones are, or if they cannot be."""
        return self.storable and visit >= self.next_visit

    def keeper(self, visit: int) -> Callable[[int, Any], None] | None:
        """Returns a function that stores the output of a visit, given the batch's number; None if none is wanted."""
        if not self.wants(visit):
            return None

        def keep(number: int, output: Any) -> None:
            tensors: list[Tensor] = []
            try:
                tree = _flatten(output, tensors)
            except TypeError:  # the run can still go on, by computing the blocks again
                self.storable = False
                return
            file = self._file(visit, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            named = {str(i): tensor.detach().cpu().contiguous() for i, tensor in enumerate(tensors)}
            write_tensors(file, named, {"tree": json.dumps(tree)})

        return keep

    def output(self, number: int, *, blank: bool) -> Any:
        """Returns a batch's stored output of the visit before `start`; `blank`: zeros of its shape that take no memory."""
        with safe_open(self._file(self.next_visit - 1, number), framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            names = map(str, range(len(file.keys())))
            tensors = [_blank(file.get_slice(name)) if blank else file.get_tensor(name) for name in names]
        return _restore(tree, tensors)

    def remove(self, visit: int) -> None:
        """Removes the outputs of a visit, which later ones have replaced."""
        shutil.rmtree(self.folder / str(visit), ignore_errors=True)

    def _file(self, visit: int, number: int) -> Path:
        return self.folder / str(visit) / f"{self._first_batch + number}.safetensors"


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Returns a nested output as JSON and appends its tensors to `tensors`; raises TypeError for any other type."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1, "device": str(value.device)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_flatten(item, tensors) for item in value]}
    if type(value) is dict:
        return {"dict": {key: _flatten(item, tensors) for key, item in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _restore(tree: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
    """Returns the nested output that `_flatten` made `tree` and `tensors` of."""
    if "tensor" in tree:
        return tensors[tree["tensor"]].to(tree["device"])
    ((kind, value),) = tree.items()
    if kind == "tuple":
        return tuple(_restore(item, tensors) for item in value)
    if kind == "list":
        return [_restore(item, tensors) for item in value]
    return {key: _restore(item, tensors) for key, item in value.items()} if kind == "dict" else value


def _blank(stored: Any) -> Tensor:
    """Returns zeros of the shape and dtype of a slice of a safetensors file; they take the memory of one number."""
    shape = stored.get_shape()
    first = stored[tuple(slice(0, 1) for _ in shape)] if shape else stored[...]
    return torch.zeros((), dtype=first.dtype).expand(shape)
