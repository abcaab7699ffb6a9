"""What of a run is done: a folder `UNFINISHED` inside the output (or beside a plan's file), until the output is complete.

`journal.jsonl` has one line for each thing that is safely on disk; a line cut short by a crash counts as
not written. `hidden/` has the inputs of the next block for every calibration batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from ..distributed import Processes
from .atomic import disk_errors, uninterrupted, write_tensors

Item = TypeVar("Item")


class Journal:
    """The record of a run, and what is needed to go on with it.

    With several processes each stores the inputs of its own batches, and the main one writes the record.

    `after_record` is called with each record once it is safely on disk, and with `{"what": "complete"}` before the
    whole journal is removed; an error that it raises stops the run at that moment, as a crash would.
    """

    def __init__(
        self, folder: Path, processes: Processes, *, after_record: Callable[[Mapping[str, Any]], None] | None = None
    ):
        self.folder = folder
        self._after_record = after_record or (lambda record: None)
        self._file = self.folder / "journal.jsonl"
        self._processes = processes
        self.blocks: dict[str, dict[str, Any]] = {}
        self._known: dict[tuple[str, str], Any] = {}
        self._pending: list[dict[str, Any]] = []
        self._start, self._batches, self._offset = 0, 0, 0
        self._storable = True
        for record in _read(self._file, repair=processes.main):
            self._take(record)
        processes.wait()  # all have read before anybody writes

    def _take(self, record: Mapping[str, Any]) -> None:
        if record["what"] == "block":
            self.blocks[record["name"]] = dict(record)
        elif record["what"] == "inputs":
            self._start = max(self._start, record["visit"] + 1)
        else:
            self._known[record["what"], record["name"]] = record["value"]

    # ---- the record

    def begin(self, phase: str, arguments: Mapping[str, Any]) -> None:
        """Begins a phase, or goes on with it; `ValueError` when it was begun with other arguments."""
        given = json.loads(json.dumps(arguments))
        known = self.recall("begin", phase)
        if known is None:
            self._append([{"what": "begin", "name": phase, "value": given}])
            return
        differing = [key for key in sorted(known.keys() | given.keys()) if known.get(key) != given.get(key)]
        if differing:
            said = "; ".join(f"{key} was {_short(known.get(key))}, now {_short(given.get(key))}" for key in differing)
            raise ValueError(
                f"{self.folder} is of an unfinished run with other arguments: {said}. "
                "Give the same to go on with it, overwrite=True (--overwrite) to start anew, or another output"
            )

    def recall(self, what: str, name: str = "") -> Any:
        """A value remembered in this run or before it was interrupted, or None."""
        return self._known.get((what, name))

    def remember(self, what: str, name: str, value: Any) -> None:
        """Keeps a value, over interruptions too if JSON gives it back unchanged."""
        if json.loads(json.dumps(value, default=repr)) == value:
            self._append([{"what": what, "name": name, "value": value}])

    def once(self, what: str, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, called only if the journal does not have it yet; kept if JSON gives it back unchanged."""
        known = self.recall(what, name)
        if known is None:
            known = make()
            self.remember(what, name, known)
        return known

    def finished(self, block: str) -> bool:
        """Returns whether a block's pruned weights are on disk."""
        return block in self.blocks

    def forget_blocks(self) -> None:
        """Starts the pruning anew, for models whose statistics need all blocks dense."""
        self.blocks.clear()
        self._start = 0

    def block_done(self, name: str, value: Mapping[str, Any]) -> None:
        """A block's weights are on disk; recorded by the next `commit`."""
        self._pending.append({"what": "block", "name": name, **value})

    def commit(self, visit: int | None) -> None:
        """Records what is pending and, with `visit`, that all outputs of that visit are stored."""
        stored = visit is not None and self._storable and visit >= self._start
        self._processes.wait()  # all have stored theirs
        records = [*self._pending, *([{"what": "inputs", "name": "", "visit": visit}] if stored else [])]
        self._pending.clear()
        self._append(records)
        if stored and visit and self._processes.main:
            shutil.rmtree(self._hidden(visit - 1), ignore_errors=True)

    def remove(self) -> None:
        """Removes the journal of a complete output; the record goes last, so that until then the run can go on."""
        self._after_record({"what": "complete"})
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self._file:
                path.unlink()
        self._file.unlink()
        self.folder.rmdir()

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            self._take(record)
        if self._processes.main and records:
            with uninterrupted(), disk_errors(self.folder), open(self._file, "ab") as file:
                file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        for record in records:
            self._after_record(record)

    # ---- the inputs of the next block

    @property
    def order(self) -> list[int] | None:
        """The blocks in the order of their visits, once known."""
        return self.recall("order")

    def begin_pass(self, order: list[int], batches: int) -> None:
        """A pruning pass over this many batches of this process begins, its blocks visited in this order."""
        counts = self._processes.gather(batches)
        self._batches, self._offset = batches, sum(counts[: self._processes.rank])
        if self.order is None:
            self.remember("order", "", order)

    @property
    def start(self) -> int:
        """The visit whose inputs are stored for all batches of this process, or 0."""
        paths = [self._batch(self._start - 1, number) for number in range(self._batches)] if self._start else []
        return self._start if paths and all(path.exists() for path in paths) else 0

    def keeper(self, visit: int) -> Callable[[int, Any], None] | None:
        """What stores a batch's output of a visit; None where a later one is stored already, or where none can be."""
        return self._keep_of(visit) if self._storable and visit >= self._start else None

    def _keep_of(self, visit: int) -> Callable[[int, Any], None]:
        def keep(number: int, output: Any) -> None:
            found: list[Tensor] = []
            try:
                tree = _flatten(output, found)
            except TypeError:  # an output of unknown kind: the run can still go on, by computing the blocks again
                self._storable = False
                return
            path = self._batch(visit, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            named = {str(i): tensor.detach().cpu().contiguous() for i, tensor in enumerate(found)}
            write_tensors(path, named, {"tree": json.dumps(tree)})

        return keep

    def output(self, number: int, *, blank: bool) -> Any:
        """A batch's stored output of the visit before `start`; or one of its shape that takes no memory."""
        with safe_open(self._batch(self._start - 1, number), framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            found = [
                _blank(file.get_slice(str(i))) if blank else file.get_tensor(str(i)) for i in range(len(file.keys()))
            ]
        return _restore(tree, found)

    def _hidden(self, visit: int) -> Path:
        return self.folder / "hidden" / str(visit)

    def _batch(self, visit: int, number: int) -> Path:
        return self._hidden(visit) / f"{self._offset + number}.safetensors"


def remembered(
    journal: Journal | None,
    processes: Processes,
    what: str,
    items: Mapping[str, Item],
    compute: Callable[[Item], Any],
) -> dict[str, Any]:
    """What `compute` gives for each item, by name: what the journal knows, and the rest shared out among the processes.

    Values are plain JSON types. Alone, each is kept as soon as it is there.
    """
    known = {name: journal.recall(what, name) if journal else None for name in items}
    todo = [name for name, value in known.items() if value is None]

    def keep(found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            known[name] = value
            if journal:
                journal.remember(what, name, value)

    if processes.count == 1:
        for name in todo:
            keep({name: compute(items[name])})
    elif todo:
        for part in processes.gather({name: compute(items[name]) for name in processes.share(todo)}):
            keep(part)
    return known


def _read(path: Path, *, repair: bool) -> list[dict[str, Any]]:
    """The records up to the first that is not whole; the rest, which a crash cut short, is removed."""
    if not path.exists():
        return []
    data, records, good = path.read_bytes(), [], 0
    for line in data.splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith(b"\n"):
                records.append(json.loads(line))
                good += len(line)
                continue
        break
    if repair and good < len(data):
        os.truncate(path, good)
    return records


def digest(value: Any) -> str:
    """A short name for a value of JSON types; equal values have equal ones."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _flatten(value: Any, found: list[Tensor]) -> Any:
    """Nested outputs as JSON, with the tensors collected in order; `TypeError` for anything else."""
    if isinstance(value, Tensor):
        found.append(value)
        return {"tensor": len(found) - 1, "device": str(value.device)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_flatten(one, found) for one in value]}
    if type(value) is dict:
        return {"dict": {key: _flatten(one, found) for key, one in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _restore(tree: Mapping[str, Any], found: Sequence[Tensor]) -> Any:
    if "tensor" in tree:
        return found[tree["tensor"]].to(tree["device"])
    ((kind, value),) = tree.items()
    if kind == "tuple":
        return tuple(_restore(one, found) for one in value)
    if kind == "list":
        return [_restore(one, found) for one in value]
    return {key: _restore(one, found) for key, one in value.items()} if kind == "dict" else value


def _blank(stored: Any) -> Tensor:
    shape = stored.get_shape()
    one = stored[tuple(slice(0, 1) for _ in shape)] if shape else stored[...]
    return torch.zeros((), dtype=one.dtype).expand(shape)
