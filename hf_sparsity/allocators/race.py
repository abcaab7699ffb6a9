"""Race and search: the options by which allocators compete, judged on the model, instead of one formula.

They stand where an allocator stands in a `SparsityConfig` but are none: judging needs the whole model and every other
allocator, so it is done in `planning/race/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ..algorithm import LOSS, Algorithm
from ..validation import check_number

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|evals|tokens|[kKMG] tokens)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "evals": 1, "tokens": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


def parse_budget(text: str | None) -> dict[str, float]:
    """`"10m"` -> `{"seconds": 600}`, `"2000 evals"` -> `{"evals": 2000}`, `"50M tokens"` -> `{"tokens": 5e7}`; None: no limit.

    An eval is one candidate on one piece of text, which has as many tokens as the first slice.
    """
    if text is None:
        return {}
    match = _BUDGET.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"budget={text!r}: a time ('90s', '10m', '2h'), '2000 evals' or '50M tokens' is expected")
    unit = match[2].split()[0]
    kind = "evals" if unit == "evals" else "seconds" if unit in "smh" else "tokens"
    return {kind: float(match[1]) * _UNITS.get(unit, 1)}


@dataclass(frozen=True)
class Race(Algorithm):
    """Lets the other allocators, their hyperparameters and mixtures of them compete, and keeps the best.

    Each plan is judged by how far the masked model departs from the dense one, on calibration text that the pruner's
    statistics never saw, in rounds on growing `slices`. From the best plan a descent moves sparsity to the layers where
    pruning one more weight costs least. `uniform` always takes part; of plans whose difference is within noise, the
    simplest wins.
    """

    candidates: tuple[str, ...] = ()  # names of allocators; none: all but those that run a search of their own
    budget: str | None = None  # see `parse_budget`
    metric: str = "kl"  # KL(dense | masked) per token, or "loss", the cross-entropy of the next token
    slices: tuple[int, ...] = (2048, 16384, 65536)  # tokens of each round, or all that there are
    confidence: float = 0.95  # level of the intervals; a difference whose interval holds 0 is noise
    descent: int = 24  # steps downhill from the best plan; 0: none

    name = "race"
    needs = frozenset({LOSS})
    searches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        object.__setattr__(self, "slices", tuple(self.slices))
        parse_budget(self.budget)
        if self.metric not in ("kl", "loss"):
            raise ValueError(f"{self.name}: metric={self.metric!r} is unknown; use 'kl' or 'loss'")
        if not self.slices or self.slices[0] < 1 or any(a >= b for a, b in zip(self.slices, self.slices[1:])):  # noqa: B905
            raise ValueError(f"{self.name}: slices={self.slices} must be rising numbers of tokens")
        check_number(f"{self.name}: descent", self.descent, "[0, inf)", whole=True, hint=": steps, or 0 for none")
        check_number(f"{self.name}: confidence", self.confidence, "(0, 1)", hint=", such as 0.95")


@dataclass(frozen=True)
class Search(Race):
    """Runs a race, and evolves its best plans until the budget is spent.

    A child moves sparsity between layers, blocks, projections or ranges of blocks, weighted by size, so that the number
    of zeros stays the same. Children are judged on a piece of text as long as the first slice, a different one in each
    generation; the better ones on as much as the second slice has; the best on all. The search can be interrupted
    (Ctrl-C) at any time and then returns the best plan so far.
    """

    budget: str | None = "10m"
    offspring: int = 8  # children in each generation
    patience: int = 200  # generations without gain before it stops

    name = "search"
    searches = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("search: offspring", self.offspring, "[1, inf)", whole=True)
        check_number("search: patience", self.patience, "[1, inf)", whole=True)
