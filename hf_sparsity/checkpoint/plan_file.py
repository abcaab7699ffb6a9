"""A plan's file, and beside it, until the plan is whole, the record of the run that makes it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..distributed import Processes
from ..files import MARKER
from ..plan import Plan
from .atomic import check_place, disk_errors
from .journal import Journal, differences

logger = logging.getLogger(__name__)


class PlanFile:
    """The JSON file `path` that `make_plan` writes a plan to; until then a record is in the folder `<path>.UNFINISHED`.

    `after_record`: see `Journal`.

    Raises:
        ValueError: `path` is a folder or, while `overwrite` is False, a file that is no plan.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        processes: Processes | None = None,
        after_record: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        self.path = Path(path)
        self.processes = processes or Processes.current()
        self._record = self.path.with_name(f"{self.path.name}.{MARKER}")
        check_place(self.path)
        if self.path.is_dir():
            raise ValueError(f"output {str(path)!r} is a folder; a file for the plan is expected, such as plan.json")
        self.is_complete = False  # by a run of the same arguments; known after `begin`
        self._plan = self._finished_plan() if self.path.exists() and not overwrite else None
        self._wipe = overwrite
        self._after_record = after_record
        if not overwrite:
            self.journal = self._new_journal()

    def _new_journal(self) -> Journal:
        return Journal(self._record, self.processes, after_record=self._after_record)

    def _finished_plan(self) -> Plan:
        """Returns the plan that is there. Raises ValueError for a file that is none."""
        try:
            plan = Plan.load(self.path)
        except (ValueError, TypeError, KeyError):
            plan = None
        if plan is None:
            raise ValueError(
                f"output {str(self.path)!r} exists; choose another name, or remove it (overwrite=True, --overwrite)"
            )
        return plan

    def earlier_arguments(self) -> set[str] | None:
        """Returns the names of the arguments of the run that began or completed the file; None if there was none."""
        if self._plan is not None:
            return {"config", "model", "data", *(["compute_dtype"] if self._plan.compute_dtype else [])}
        before = None if self._wipe else self.journal.recall("begin", "plan")
        return None if before is None else set(before)

    def _compare(self, plan: Plan, arguments: Mapping[str, Any]) -> None:
        before = {"config": plan.config, "model": plan.model, "data": plan.data or arguments.get("data")}
        if plan.data is not None:
            before["compute_dtype"] = plan.compute_dtype
        now = {key: arguments.get(key) for key in before}
        if plan.chosen:  # its `data` are those of the choice; what the whole of them was, the race's record says
            before["data"], now["data"] = (
                (each or {}).get("sha256") for each in (plan.chosen.get("data"), now["data"])
            )
        if differing := differences(json.loads(json.dumps(before)), json.loads(json.dumps(now))):
            raise ValueError(
                f"output {str(self.path)!r} is complete already, of a run with other arguments: {differing}. "
                "overwrite=True (--overwrite) replaces it, or choose another name"
            )
        logger.info("%s is complete already, of a run with the same arguments", self.path)
        self.is_complete = True

    def begin(self, phase: str, arguments: Mapping[str, Any]) -> None:
        """Begins planning, or goes on with it; before this call nothing is written.

        A plan that a run of the same arguments has written is left as it is, and `is_complete` is True then.

        Raises:
            ValueError: a run with other arguments is there, unfinished or complete.
            OSError: the folder cannot be written to.
        """
        if self._plan is not None:
            self._compare(self._plan, arguments)
            return
        if self.processes.main:
            if self._wipe:
                shutil.rmtree(self._record, ignore_errors=True)
            with disk_errors(self.path.parent):
                self._record.mkdir(parents=True, exist_ok=True)
        self.processes.wait()
        if self._wipe:
            self._wipe, self.journal = False, self._new_journal()
        self.journal.begin(phase, arguments)

    def save(self, plan: Plan) -> None:
        """Writes the plan and removes the record; leaves a file alone that is complete already."""
        if self.processes.main and not self.is_complete:
            with disk_errors(self.path.parent):
                plan.save(self.path)
                self.journal.remove()
        self.processes.wait()
