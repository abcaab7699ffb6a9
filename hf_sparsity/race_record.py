"""What a race or search writes down: the record that stands in the plan's JSON, and the details that stay beside it.

The details hang on the plan in memory and are no part of its JSON: a `config.json` stays small, and seconds, which differ
from run to run, would make two plans of one seed differ. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .records import Comparison, Interval, SourcePlans


@dataclass(frozen=True)
class CandidateRecord:
    """The result of one plan in a race.

    Args:
        name: tells the plan apart, such as `"owl(outlier=5.0, spread=0.08)"`.
        kind: "uniform", "single" (one allocator), "mixture", "descent" or "search".
        origin: how it was made: the allocator's `to_dict`, the names of a mixture's parts, or what a search did.
        scores: the race's metric after each round that the plan took part in, lower is better.
        perplexity: on the slice of its last round.
        uniform_minus: by how much uniform's metric is higher there.
    """

    name: str
    kind: str
    origin: Mapping[str, Any]
    scores: tuple[float, ...]
    perplexity: float
    uniform_minus: Interval

    def to_dict(self, metric: str) -> dict[str, Any]:
        """Returns plain JSON types; `scores` stand under the metric's name."""
        return {
            "name": self.name,
            "kind": self.kind,
            "origin": dict(self.origin),
            metric: list(self.scores),
            "perplexity": self.perplexity,
            "uniform_minus": self.uniform_minus.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], metric: str) -> CandidateRecord:
        """The reverse of `to_dict`."""
        same = {name: data[name] for name in ("name", "kind", "origin", "perplexity")}
        return cls(**same, scores=tuple(data[metric]), uniform_minus=Interval.from_dict(data["uniform_minus"]))


@dataclass(frozen=True)
class RaceRecord:
    """The record of how a race or search came to its plan; `Plan.chosen` is its `to_dict`.

    Args:
        by: "race" or "search".
        metric: what plans were judged by: "kl" or "loss", per token.
        winner: name of the chosen plan, and `kind`, its kind.
        slices: tokens of each round's text.
        confidence: of the intervals.
        seed: of the run.
        candidates: all plans, the best first.
        spent: `{"evals", "tokens"}`.
        data: how many calibration sequences served for what, and their hash.
        certificate: the winner against uniform, on text that nothing before has seen.
        descent: where a descent began, and its steps; `search`: of a search the generations; `sources`: of a calibration
            mix both plans by source. Each None where there was none.
        stand_in: the masks that plans were judged by, where the pruner itself chooses others; "" where they are its own.
    """

    by: str
    metric: str
    winner: str
    kind: str
    slices: tuple[int, ...]
    confidence: float
    seed: int
    candidates: tuple[CandidateRecord, ...]
    spent: Mapping[str, int]
    data: Mapping[str, Any]
    certificate: Comparison
    descent: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    sources: Mapping[str, SourcePlans] | None = None
    stand_in: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, without what there was none of."""
        sources = None if self.sources is None else {name: both.to_dict() for name, both in self.sources.items()}
        optional = {"descent": self.descent, "search": self.search, "sources": sources}
        return {
            "by": self.by,
            "metric": self.metric,
            "winner": self.winner,
            "kind": self.kind,
            "slices": list(self.slices),
            "confidence": self.confidence,
            "seed": self.seed,
            "candidates": [candidate.to_dict(self.metric) for candidate in self.candidates],
            "spent": dict(self.spent),
            **{name: dict(value) for name, value in optional.items() if value is not None},
            **({"stand_in": self.stand_in} if self.stand_in else {}),
            "data": dict(self.data),
            "certificate": self.certificate.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> RaceRecord:
        """The reverse of `to_dict`; `ValueError` when `data` is something else."""
        try:
            metric, sources = data["metric"], data.get("sources")
            return cls(
                **{
                    name: data[name]
                    for name in ("by", "metric", "winner", "kind", "confidence", "seed", "spent", "data")
                },
                slices=tuple(data["slices"]),
                candidates=tuple(CandidateRecord.from_dict(candidate, metric) for candidate in data["candidates"]),
                certificate=Comparison.from_dict(data["certificate"]),
                descent=data.get("descent"),
                search=data.get("search"),
                stand_in=str(data.get("stand_in", "")),
                sources=sources and {name: SourcePlans.from_dict(both) for name, both in sources.items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not the record of a race or search: {error!r}") from None


@dataclass(frozen=True)
class RaceDetails:
    """What a race or search saw beyond its record, for a page to look at.

    Args:
        plans: name -> {layer: sparsity}: the winner first, then the best others.
        measures: allocator -> {layer: the number that it measured}.
        curve: (tokens spent, the best metric so far, seconds since the start) at each gain of a search and at its end.
        seconds: the whole choice, measuring included; of a part that was interrupted, what it took until its last gain.
    """

    plans: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curve: tuple[tuple[int, float, float], ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
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
