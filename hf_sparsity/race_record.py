"""Story: what a race or search saw beyond the plan it chose, for a page to look at. JSON, standard library only.

It hangs on the plan in memory and is no part of its JSON: a `config.json` stays small, and seconds, which differ from run
to run, would make two plans of one seed differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RaceDetails:
    """What became of the contestants.

    `plans`: the winner, then the best others -> {layer: sparsity}. `measures`: what an allocator measured -> {layer: number}.
    `curve`: (tokens spent, the best metric so far, seconds since the start) at each gain of the search and at its end.
    `seconds`: all that the choice took, measuring too; of a part that was interrupted, what it took until its last gain.
    """

    plans: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curve: tuple[tuple[int, float, float], ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "plans": {name: dict(layers) for name, layers in self.plans.items()},
            "measures": {name: dict(layers) for name, layers in self.measures.items()},
            "curve": [list(point) for point in self.curve],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RaceDetails:
        """The reverse of `to_dict`."""
        return cls(data["plans"], data["measures"], tuple((t, m, s) for t, m, s in data["curve"]), data["seconds"])
