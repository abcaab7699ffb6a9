"""Hidden states of waiting batches are kept on disk beyond a limit of memory.

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

SMALLEST = 1 << 16  # bytes; a smaller storage is not worth a file

Key: TypeAlias = "int | tuple[str, int]"  # the number of a batch, or (name, number) of something recorded of it


class Spill:
    """Keeps at most about `limit` bytes of the inputs of waiting batches in memory, the others in `folder`.

    Only storages that belong to one batch are touched: not weights, buffers or batches (`shared`), and
    nothing that two batches have in common. What a consumer records of a batch may wait here in the same way.
    """

    def __init__(self, limit: int, shared: Iterable[Tensor], folder: Path | None = None):
        self._limit = limit
        self._folder = Path(tempfile.mkdtemp(prefix="hidden_", dir=folder))
        self._shared = _storages(t for t in shared if t.device.type != "meta")
        self._held: dict[Key, dict[int, UntypedStorage]] = {}  # waiting batch -> address -> storage
        self._on_disk: dict[Key, dict[int, int]] = {}  # batch -> address of a storage -> its bytes
        self._last: Key | None = None  # leaves memory once the next batch has shown which storages both share

    def arrive(self, batch: Key, call: Any) -> None:
        """Takes note that a batch has come to a block and waits there with these inputs."""
        self._held[batch] = {k: s for k, s in _storages(tensors(call)).items() if s.nbytes() >= SMALLEST}
        if self._last is not None and self._last in self._held:
            common = self._held[self._last].keys() & self._held[batch].keys() if self._last != batch else set()
            self._shared |= {key: self._held[batch][key] for key in common}
            self.rest(self._last)
        self._last = batch

    def rest(self, batch: Key) -> None:
        """Lets the inputs of a waiting batch leave memory if they exceed the limit; `fetch` brings them back."""
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
        """Forgets a batch that walks on, its inputs filled again in case the model looks at them later."""
        self.fetch(batch)
        self.drop(batch)

    def drop(self, batch: Key) -> None:
        """Forgets inputs that nothing will look at again, without filling them."""
        del self._held[batch]
        for key in self._on_disk.pop(batch, {}):
            self._file(batch, key).unlink()

    def close(self) -> None:
        """Fills everything, so that no tensor is left without its data, and removes the files."""
        for batch in list(self._held):
            self.leave(batch)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _private(self, batch: Key) -> dict[int, UntypedStorage]:
        return {key: s for key, s in self._held[batch].items() if key not in self._shared}

    def _file(self, batch: Key, key: int) -> Path:
        name = batch if isinstance(batch, int) else "-".join(map(str, batch))
        return self._folder / f"{name}.{key:x}"


def _storages(values: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Returns the storages of tensors by address; while the result lives, no address is used again."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in values)}


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields all tensors in nested arguments that are no parameters, in order."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
