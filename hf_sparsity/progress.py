"""Progress of long work: a bar where a person looks at a terminal, elsewhere a line now and then.

Lines go to the logger of this file at level INFO: the command line shows them on stderr, a program sees them if it asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SECONDS = 10.0  # between two lines
Item = TypeVar("Item")


class Bar:
    """The progress of one piece of work, as `with Bar(...) as bar:`; `step` counts, `say` tells what is being done.

    Args:
        title: what is done, such as "Pruning".
        total: number of steps; None if it is not known.
        unit: what a step is, such as "block".
        done: steps that an earlier run had taken.
        shown: False where another process of the run shows it.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "step", *, done: int = 0, shown: bool = True):
        options: dict[str, Any] = {"total": total, "desc": title, "unit": unit, "initial": done}
        self._bar = tqdm(**options, leave=False, disable=None if shown else True)
        self._lines = shown and bool(self._bar.disable)
        self._title, self._total, self._unit = title, total, unit
        self._start = self._last = time.perf_counter()
        self._text = ""
        self.count = done

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """Counts one more step and shows it."""
        self.count += 1
        self._bar.update()
        self._line()

    def say(self, text: str) -> None:
        """Shows this text beside the count, until it is called again."""
        self._text = text
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        self._line()

    def _line(self) -> None:
        now = time.perf_counter()
        if not self._lines or now - self._last < SECONDS:
            return
        self._last = now
        of = "" if self._total is None else f" of {self._total}"
        units = f"{self._unit}es" if self._unit.endswith("ch") else f"{self._unit}s"
        parts = [f"{self.count}{of} {units}", f"{now - self._start:.0f} s", self._text]
        logger.info("%s: %s", self._title, ", ".join(filter(None, parts)))


def follow(items: Collection[Item], title: str, unit: str, *, shown: bool = True) -> Iterator[Item]:
    """Yields the items, with a bar or lines that count them."""
    with Bar(title, len(items), unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.step()
