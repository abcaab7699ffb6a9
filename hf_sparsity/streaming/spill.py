"""Hidden states of waiting batches, beyond a limit, wait on disk.

While a batch waits at a block, its inputs are also held by the local variables of the model's own
forward, so letting go of them would free nothing. Their storages are emptied in place instead, as
FSDP does with gathered parameters, and filled again before anybody looks.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage, nn

SMALLEST = 1 << 16  # bytes of a storage that is worth a file

Key: TypeAlias = "int | tuple[str, int]"  # a batch, or something recorded of a batch


class Spill:
    """Keeps at most about `limit` bytes of the inputs of waiting batches in memory, the others in `folder`.

    Only storages that belong to one batch are touched: not weights, buffers or batches (`shared`), and
    nothing that two batches have in common. What a consumer records of a batch may wait here in the same way.
    """

    def __init__(self, limit: int, shared: Iterable[Tensor], folder: Path | None = None):
        self._limit = limit
        self._folder = Path(tempfile.mkdtemp(prefix="hidden_", dir=folder))
        self._shared = _storages(t for t in shared if t.device.type != "meta")
        self._held: dict[Key, dict[int, UntypedStorage]] = {}  # of each waiting batch
        self._on_disk: dict[Key, dict[int, int]] = {}  # of each batch: storage -> bytes
        self._last: Key | None = None  # rests once the next has shown that it shares nothing with it

    def arrive(self, batch: Key, call: Any) -> None:
        """A batch has come to a block and waits there with these inputs."""
        self._held[batch] = {k: s for k, s in _storages(tensors(call)).items() if s.nbytes() >= SMALLEST}
        if self._last is not None and self._last in self._held:
            common = self._held[self._last].keys() & self._held[batch].keys() if self._last != batch else set()
            self._shared |= {key: self._held[batch][key] for key in common}
            self.rest(self._last)
        self._last = batch

    def rest(self, batch: Key) -> None:
        """The inputs of a waiting batch are not needed for a while; beyond the limit they leave memory."""
        mine = self._private(batch)
        if batch not in self._on_disk:
            if sum(s.nbytes() for other in self._held for s in self._private(other).values()) <= self._limit:
                return
            for key, storage in mine.items():
                if storage.resizable():
                    _bytes(storage).to("cpu", copy=True).numpy().tofile(self._file(batch, key))
                    self._on_disk.setdefault(batch, {})[key] = storage.nbytes()
        for key in self._on_disk.get(batch, {}):
            mine[key].resize_(0)

    def fetch(self, batch: Key) -> None:
        """Fills the inputs of a waiting batch again."""
        for key, size in self._on_disk.get(batch, {}).items():
            storage = self._held[batch][key]
            if storage.nbytes() == 0:
                storage.resize_(size)
                _bytes(storage).copy_(torch.from_file(str(self._file(batch, key)), size=size, dtype=torch.uint8))

    def leave(self, batch: Key) -> None:
        """The batch walks on: its inputs are filled, in case the model looks at them again, and forgotten."""
        self.fetch(batch)
        self.drop(batch)

    def drop(self, batch: Key) -> None:
        """Nobody will look at these inputs again: they are forgotten as they are."""
        del self._held[batch]
        for key in self._on_disk.pop(batch, {}):
            self._file(batch, key).unlink()

    def close(self) -> None:
        """Fills everything, so that no tensor stays behind without its data, and removes the files."""
        for batch in list(self._held):
            self.leave(batch)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _private(self, batch: Key) -> dict[int, UntypedStorage]:
        return {key: s for key, s in self._held[batch].items() if key not in self._shared}

    def _file(self, batch: Key, key: int) -> Path:
        name = batch if isinstance(batch, int) else "-".join(map(str, batch))
        return self._folder / f"{name}.{key:x}"


def _storages(values: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """By address; whoever keeps the result keeps the addresses from being used again."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in values)}


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments, in order."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
