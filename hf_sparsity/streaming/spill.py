"""Hidden states of waiting batches leave a device, and beyond a limit memory too.

While a batch waits at a block, its inputs are also held by the local variables of the model's own
forward, so letting go of them would free nothing. Their storages are emptied in place instead, as
FSDP does with gathered parameters, and filled again before anybody looks. What lay on an accelerator
waits in the memory of the host, what exceeds the limit of that on disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage, nn

from ..model.devices import is_accelerator

SMALLEST = 1 << 16  # bytes; a smaller storage is not worth a file

Key: TypeAlias = "int | tuple[str, int]"  # the number of a batch, or (name, number) of something recorded of it


class Spill:
    """Keeps the inputs of waiting batches out of the way.

    At most about `limit` bytes of them stay in memory, the others go to `folder`; None: all stay. Of those in memory at
    most about `room` bytes stay on accelerators, the others wait on the host; None: all stay.

    Only storages that belong to one batch are touched: not weights, buffers or batches (`shared`), and
    nothing that two batches have in common. What a consumer records of a batch may wait here in the same way.
    """

    def __init__(
        self, limit: int | None, shared: Iterable[Tensor], folder: Path | None = None, *, room: int | None = None
    ):
        self._limit, self._room = limit, room
        self._folder = Path(tempfile.mkdtemp(prefix="hidden_", dir=folder)) if limit is not None else None
        self._shared = _storages(t for t in shared if t.device.type != "meta")
        self._held: dict[Key, dict[int, UntypedStorage]] = {}  # waiting batch -> address -> storage
        self._on_disk: dict[Key, dict[int, int]] = {}  # batch -> address of a storage -> its bytes
        self._on_host: dict[Key, dict[int, Tensor]] = {}  # batch -> address of a storage of an accelerator -> its bytes
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
        """Lets the inputs of a waiting batch leave the device or memory if they exceed a limit; `fetch` brings them back."""
        mine = self._private(batch)
        if batch not in self._on_disk and batch not in self._on_host:
            if self._limit is not None and self._in_memory() > self._limit:
                self._write(batch, mine)
            elif self._room is not None and self._on_devices() > self._room:
                self._on_host[batch] = {
                    key: _bytes(storage).to("cpu") for key, storage in mine.items() if is_accelerator(storage.device)
                }
        for key in [*self._on_disk.get(batch, {}), *self._on_host.get(batch, {})]:
            mine[key].resize_(0)

    def make_room(self, but: Key | None = None) -> bool:
        """Lets the inputs of all batches but one leave the accelerators from now on; returns whether any did."""
        before, self._room = self._on_devices(), 0
        for batch in list(self._held):
            if batch != but:
                self.rest(batch)
        return self._on_devices() < before

    def fetch(self, batch: Key) -> None:
        """Fills the inputs of a waiting batch again."""
        for key, size in self._on_disk.get(batch, {}).items():
            storage = self._held[batch][key]
            if storage.nbytes() == 0:
                storage.resize_(size)
                _bytes(storage).copy_(torch.from_file(str(self._file(batch, key)), size=size, dtype=torch.uint8))
        for key, values in self._on_host.get(batch, {}).items():
            storage = self._held[batch][key]
            if storage.nbytes() == 0:
                storage.resize_(values.numel())
                _bytes(storage).copy_(values)

    def leave(self, batch: Key) -> None:
        """Forgets a batch that walks on, its inputs filled again in case the model looks at them later."""
        self.fetch(batch)
        self.drop(batch)

    def drop(self, batch: Key) -> None:
        """Forgets inputs that nothing will look at again, without filling them."""
        del self._held[batch]
        self._on_host.pop(batch, None)
        for key in self._on_disk.pop(batch, {}):
            self._file(batch, key).unlink()

    def close(self) -> None:
        """Fills everything, so that no tensor is left without its data, and removes the files."""
        for batch in list(self._held):
            self.leave(batch)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, batch: Key, mine: Mapping[int, UntypedStorage]) -> None:
        for key, storage in mine.items():
            if storage.resizable():
                _bytes(storage).to("cpu", copy=True).numpy().tofile(self._file(batch, key))
                self._on_disk.setdefault(batch, {})[key] = storage.nbytes()

    def _in_memory(self) -> int:
        """Returns the bytes of all waiting batches that are in the memory of devices and host."""
        waiting = sum(s.nbytes() for other in self._held for s in self._private(other).values())
        return waiting + sum(values.numel() for parked in self._on_host.values() for values in parked.values())

    def _on_devices(self) -> int:
        return sum(
            s.nbytes() for other in self._held for s in self._private(other).values() if is_accelerator(s.device)
        )

    def _private(self, batch: Key) -> dict[int, UntypedStorage]:
        return {key: s for key, s in self._held[batch].items() if key not in self._shared}

    def _file(self, batch: Key, key: int) -> Path:
        assert self._folder is not None
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
