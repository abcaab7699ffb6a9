"""The record of an unfinished run, in a folder `UNFINISHED` inside its output (or beside a plan's file).

`journal.jsonl` has one line for each thing that is safely on disk; a line cut short by a crash counts as not written.
`hidden/` has the inputs of the next block for every calibration batch, see `hidden_states.py`.
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

from ..distributed import Processes
from .atomic import disk_errors, uninterrupted
from .hidden_states import HiddenStates

Item = TypeVar("Item")


class Journal:
    """The record of a run: what of it is done, and which values were computed.

    With several processes the main one writes the record, and all read it.

    `after_record` is called with each record once it is safely on disk, and with `{"what": "complete"}` before the
    whole journal is removed; an error that it raises stops the run at that moment, as a crash would.

    Attributes:
        folder: where the record is.
        blocks: the record of each finished block, by name.
        hidden: the stored inputs of the next block.
    """

    def __init__(
        self, folder: Path, processes: Processes, *, after_record: Callable[[Mapping[str, Any]], None] | None = None
    ):
        self.folder = folder
        self.blocks: dict[str, dict[str, Any]] = {}
        self.hidden = HiddenStates(folder / "hidden", processes)
        self._after_record = after_record or (lambda record: None)
        self._file = folder / "journal.jsonl"
        self._processes = processes
        self._values: dict[tuple[str, str], Any] = {}
        self._pending: list[dict[str, Any]] = []
        for record in _read(self._file, repair=processes.main):
            self.take(record)
        processes.wait()  # all have read before anybody writes

    def take(self, record: Mapping[str, Any]) -> None:
        """Takes a record into memory as if it had been read; nothing is written."""
        if record["what"] == "block":
            self.blocks[record["name"]] = dict(record)
        elif record["what"] == "inputs":
            self.hidden.next_visit = max(self.hidden.next_visit, record["visit"] + 1)
        else:
            self._values[record["what"], record["name"]] = record["value"]

    def begin(self, phase: str, arguments: Mapping[str, Any]) -> None:
        """Begins a phase, or goes on with it. Raises ValueError when it was begun with other arguments."""
        arguments = json.loads(json.dumps(arguments))
        before = self.recall("begin", phase)
        if before is None:
            self._append([{"what": "begin", "name": phase, "value": arguments}])
            return
        if differing := differences(before, arguments):
            raise ValueError(
                f"{self.folder} is of an unfinished run with other arguments: {differing}. "
                "Give the same to go on with it, overwrite=True (--overwrite) to start anew, or another output"
            )

    def recall(self, what: str, name: str = "") -> Any:
        """Returns a value remembered in this run or before it was interrupted; None if there is none."""
        return self._values.get((what, name))

    def remember(self, what: str, name: str, value: Any) -> None:
        """Records a value, if JSON gives it back unchanged."""
        if json.loads(json.dumps(value, default=repr)) == value:
            self._append([{"what": what, "name": name, "value": value}])

    def once(self, what: str, name: str, make: Callable[[], Any]) -> Any:
        """Returns the recorded value, or else what `make` returns, which is then recorded as by `remember`."""
        value = self.recall(what, name)
        if value is None:
            value = make()
            self.remember(what, name, value)
        return value

    @property
    def order(self) -> list[int] | None:
        """The blocks in the order of their visits; None before a pass has begun."""
        return self.recall("order")

    def begin_pass(self, order: list[int], batches: int) -> None:
        """Begins a pruning pass over this number of batches of this process, which visits the blocks in this order."""
        self.hidden.begin_pass(batches)
        if self.order is None:
            self.remember("order", "", order)

    def finished(self, block: str) -> bool:
        """Returns whether a block's pruned weights are on disk."""
        return block in self.blocks

    def forget_blocks(self) -> None:
        """Makes the pruning start anew, for models whose statistics need all blocks dense."""
        self.blocks.clear()
        self.hidden.next_visit = 0

    def block_done(self, name: str, value: Mapping[str, Any]) -> None:
        """Notes that a block's weights are on disk; the next `commit` records it."""
        self._pending.append({"what": "block", "name": name, **value})

    def commit(self, visit: int | None) -> None:
        """Records the blocks that were noted and, unless `visit` is None, that all outputs of that visit are stored."""
        stored = visit is not None and self.hidden.wants(visit)
        self._processes.wait()  # all have stored theirs
        records = [*self._pending, *([{"what": "inputs", "name": "", "visit": visit}] if stored else [])]
        self._pending.clear()
        self._append(records)
        if stored and visit and self._processes.main:
            self.hidden.remove(visit - 1)

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
            self.take(record)
        if self._processes.main and records:
            with uninterrupted(), disk_errors(self.folder), open(self._file, "ab") as file:
                file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        for record in records:
            self._after_record(record)


def remembered(
    journal: Journal | None,
    processes: Processes,
    what: str,
    items: Mapping[str, Item],
    compute: Callable[[Item], Any],
) -> dict[str, Any]:
    """Returns `compute(item)` for each item, by name: from the journal, and the rest shared out among the processes.

    Values are plain JSON types. A process that is alone records each value as soon as it is computed.
    """
    values = {name: journal.recall(what, name) if journal else None for name in items}
    todo = [name for name, value in values.items() if value is None]

    def keep(computed: Mapping[str, Any]) -> None:
        for name, value in computed.items():
            values[name] = value
            if journal:
                journal.remember(what, name, value)

    if processes.count == 1:
        for name in todo:
            keep({name: compute(items[name])})
    elif todo:
        for part in processes.gather({name: compute(items[name]) for name in processes.share(todo)}):
            keep(part)
    return values


def _read(path: Path, *, repair: bool) -> list[dict[str, Any]]:
    """Returns the records up to the first that is not whole; `repair` removes the rest, which a crash cut short."""
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
    """Returns a short name for a value of JSON types; equal values have equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Returns a short name for each argument of a run, by which runs are compared; versions of libraries do not count."""
    return {key: digest(json.loads(json.dumps(value))) for key, value in arguments.items() if key != "versions"}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says which arguments of two runs differ, and how; "" if none do."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "..."
