"""Measured numbers with their intervals, comparisons of two plans, and scores by source. JSON, standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A measured `value` and the confidence interval around it; `low` and `high` are None where only one unit was measured."""

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_finite(self, "value", "low", "high")

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]")

    @property
    def is_above_zero(self) -> bool | None:
        """True if the whole interval is above zero, False if it is below, None if zero cannot be ruled out."""
        if self.low is not None and self.low > 0:
            return True
        return False if self.high is not None and self.high < 0 else None

    def to_dict(self) -> dict[str, float | None]:
        """Returns `{"value", "low", "high"}`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Interval:
        """Returns the interval that `to_dict` wrote; `ValueError` when `data` is something else."""
        if not isinstance(data, Mapping) or data.keys() != {"value", "low", "high"}:
            raise ValueError(f"an interval is {data!r}; an object of value, low and high is expected")
        return cls(**data)


@dataclass(frozen=True)
class PlanPair:
    """One quantity of a uniform and of a chosen plan, and the difference with its paired confidence interval."""

    uniform: float
    chosen: float
    uniform_minus_chosen: Interval

    def __post_init__(self) -> None:
        check_finite(self, "uniform", "chosen")

    def __str__(self) -> str:
        return f"uniform {self.uniform:.4f}, chosen {self.chosen:.4f}, difference {self.uniform_minus_chosen}"

    @classmethod
    def from_dict(cls, data: Any) -> PlanPair:
        """Returns the pair that `dataclasses.asdict` made plain; `ValueError` when `data` is something else."""
        names = ("uniform", "chosen", "uniform_minus_chosen")
        if not isinstance(data, Mapping) or not set(names) <= data.keys():
            raise ValueError(f"a comparison holds {data!r}; an object of {', '.join(names)} is expected")
        return cls(data["uniform"], data["chosen"], Interval.from_dict(data["uniform_minus_chosen"]))


@dataclass(frozen=True)
class Comparison:
    """The paired comparison of a chosen plan with a uniform one of the same sparsity, on the same sequences.

    Args:
        kl: KL divergence from the dense model, nats a token.
        perplexity: of the next token.
        predictions: tokens that were predicted, in `sequences` sequences.
        sequences, confidence, resamples, seed: of the bootstrap over sequences behind the intervals.
        of: "masks" (on the dense model's weights, before anything is pruned) or "models" (finished ones), if recorded.
        data: fingerprint of the text, if recorded.
    """

    kl: PlanPair
    perplexity: PlanPair
    predictions: int
    sequences: int | None = None
    confidence: float | None = None
    resamples: int | None = None
    seed: int | None = None
    of: str | None = None
    data: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_counts(self, "predictions")

    @property
    def pays(self) -> bool | None:
        """True if the chosen plan has the lower KL, False if the higher, None if the two cannot be told apart."""
        return self.kl.uniform_minus_chosen.is_above_zero

    def lines(self) -> list[str]:
        """Returns the comparison in words, one line for KL and one for perplexity."""
        return [f"kl: {self.kl}", f"perplexity: {self.perplexity}"]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, without what was not recorded."""
        order = ("kl", "perplexity", "sequences", "predictions", "confidence", "resamples", "seed", "of", "data")
        plain = asdict(self)
        return {name: plain[name] for name in order if plain[name] is not None}

    @classmethod
    def from_dict(cls, data: Any) -> Comparison:
        """Returns the comparison that `to_dict` wrote, also with further keys; `ValueError` when `data` is something else."""
        needed = ("kl", "perplexity", "predictions")
        if not isinstance(data, Mapping) or not set(needed) <= data.keys():
            raise ValueError(f"a comparison of two plans is damaged: {', '.join(needed)} are expected")
        pairs = {name: PlanPair.from_dict(data[name]) for name in ("kl", "perplexity")}
        names = ("predictions", "sequences", "confidence", "resamples", "seed", "of", "data")
        return cls(**pairs, **{name: data.get(name) for name in names})  # type: ignore[arg-type]


@dataclass(frozen=True)
class SourceScore:
    """Scores of a pruned model against the dense one on one source of a calibration mix, on sequences kept apart.

    Args:
        weight: the source's share of the mix.
        sequences: how many there are, with `predictions` tokens that were predicted.
        kl: KL divergence from the dense model, nats a token.
        dense: perplexity of the dense model, and `pruned`, of the pruned one.
    """

    weight: float
    sequences: int
    predictions: int
    kl: float
    dense: float
    pruned: float

    def __post_init__(self) -> None:
        check_finite(self, "weight", "kl", "dense", "pruned")
        check_counts(self, "sequences", "predictions")

    def to_dict(self) -> dict[str, Any]:
        """Returns an entry of `Report.sources`."""
        plain = asdict(self)
        perplexity = {"dense": plain.pop("dense"), "pruned": plain.pop("pruned")}
        return {**plain, "perplexity": perplexity}

    @classmethod
    def from_dict(cls, data: Any) -> SourceScore:
        """Returns the scores that `to_dict` wrote; `ValueError` when `data` is something else."""
        names = ("weight", "sequences", "predictions", "kl")
        perplexity = data.get("perplexity") if isinstance(data, Mapping) else None
        if (
            not isinstance(perplexity, Mapping)
            or not {*names} <= data.keys()
            or not {"dense", "pruned"} <= perplexity.keys()
        ):
            raise ValueError(
                f"the scores of a source are damaged: {', '.join(names)} and perplexity (dense, pruned) are expected"
            )
        plain = {name: data[name] for name in names}
        return cls(**plain, dense=perplexity["dense"], pruned=perplexity["pruned"])


@dataclass(frozen=True)
class SourcePlans:
    """The KL divergence from the dense model of a uniform and a chosen plan on one source of a calibration mix."""

    sequences: int
    uniform: float
    chosen: float

    def __post_init__(self) -> None:
        check_finite(self, "uniform", "chosen")
        check_counts(self, "sequences")

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"sequences", "uniform", "chosen"}`, the divergences in nats a token."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SourcePlans:
        """Returns the divergences that `to_dict` wrote; `ValueError` when `data` is something else."""
        names = ("sequences", "uniform", "chosen")
        if not isinstance(data, Mapping) or not set(names) <= data.keys():
            raise ValueError(f"the two plans on a source are damaged: {', '.join(names)} are expected")
        return cls(*(data[name] for name in names))


def check_finite(record: Any, *names: str) -> None:
    """Raises `ValueError` unless these fields are finite numbers; `low`, `high` and `stderr` may be None."""
    for name in names:
        value = getattr(record, name)
        if value is None and name in ("low", "high", "stderr"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} of a measurement is {value!r}; a finite number is expected")


def check_counts(record: Any, *names: str) -> None:
    """Raises `ValueError` unless these fields are whole numbers."""
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} of a measurement is {value!r}; a whole number is expected")
