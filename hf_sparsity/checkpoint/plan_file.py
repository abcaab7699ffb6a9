"""A plan's file, and beside it, until the plan is whole, the record of the run that makes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..distributed import Processes
from ..files import MARKER
from ..plan import Plan
from .atomic import disk_errors
from .journal import Journal


class PlanFile:
    """The JSON file `path` that `make_plan` writes a plan to; until then a record is in the folder `<path>.UNFINISHED`.

    Raises:
        ValueError: `path` is a folder, or a file that exists while `overwrite` is False.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, processes: Processes | None = None):
        self.path = Path(path)
        self.processes = processes or Processes.current()
        self._record = self.path.with_name(f"{self.path.name}.{MARKER}")
        if self.path.is_dir():
            raise ValueError(f"output {str(path)!r} is a folder; a file for the plan is expected, such as plan.json")
        if self.path.exists() and not overwrite:
            raise ValueError(
                f"output {str(path)!r} exists; choose another name, or remove it (overwrite=True, --overwrite)"
            )
        self._wipe = overwrite
        if not overwrite:
            self.journal = Journal(self._record, self.processes)

    def begin(self, phase: str, arguments: Mapping[str, Any]) -> None:
        """Begins planning, or goes on with it; before this call nothing is written.

        Raises:
            ValueError: an unfinished run with other arguments is there.
            OSError: the folder cannot be written to.
        """
        if self.processes.main:
            if self._wipe:
                shutil.rmtree(self._record, ignore_errors=True)
            with disk_errors(self.path.parent):
                self._record.mkdir(parents=True, exist_ok=True)
        self.processes.wait()
        if self._wipe:
            self._wipe, self.journal = False, Journal(self._record, self.processes)
        self.journal.begin(phase, arguments)

    def save(self, plan: Plan) -> None:
        """Writes the plan and removes the record."""
        if self.processes.main:
            with disk_errors(self.path.parent):
                plan.save(self.path)
                self.journal.remove()
        self.processes.wait()
