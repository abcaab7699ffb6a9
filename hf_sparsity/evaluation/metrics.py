"""Recorded evaluations: `sparsity_metrics.json` in a sparse model's folder.

    {"version": 1,
     "texts": [{"name", "split", "data": {"sequences", "tokens", "sha256"}, "length", "windows", "unit", "documents",
                "predictions", "weights", "perplexity": INTERVAL,
                "against": null | {"name", "weights", "perplexity": INTERVAL, "ratio": INTERVAL, "kl": INTERVAL,
                                   "top1": INTERVAL},
                "confidence", "resamples", "seed", "versions"}],
     "tasks": [{"name", "version", "shots", "limit", "samples", "weights", "metrics": {metric: SCORE},
                "against": null | {"name", "weights", "metrics": {metric: SCORE}, "difference": {metric: INTERVAL}},
                "confidence", "resamples", "seed", "harness", "versions"}]}

INTERVAL is {"value", "low", "high"}, the last two null where there was only one unit to draw from; SCORE is {"value",
"stderr"}, null where the harness gives none. `weights` fingerprints the scored weights (`model/fingerprint.py`), so that a
reader sees whether they are still the folder's. `compute_dtype` stands beside "versions" where there was a choice, see
`model/precision.recorded_name`. `unit` is what was resampled, `documents` how many of them there were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..plan import read_json, write_json
from ..records import Interval as Interval
from ..records import check_finite

METRICS_FILE = "sparsity_metrics.json"
VERSION = 1


@dataclass(frozen=True)
class Score:
    """One metric of a task as the harness reports it."""

    value: float
    stderr: float | None = None

    def __post_init__(self) -> None:
        check_finite(self, "value", "stderr")


@dataclass(frozen=True)
class TextAgainst:
    """The comparison with the dense model on one text.

    `perplexity` is the dense model's, `ratio` the sparse one's over it, `kl` the mean KL(dense ‖ sparse) in nats a
    token, `top1` the share of positions where both rank the same token first.
    """

    name: str
    weights: str | None
    perplexity: Interval
    ratio: Interval
    kl: Interval
    top1: Interval


@dataclass(frozen=True)
class TextRecord:
    """Perplexity on one text; `documents` units of the kind `unit` were resampled for the intervals."""

    name: str
    split: str | None
    data: Mapping[str, Any]
    length: int
    windows: int
    unit: str
    documents: int
    predictions: int
    weights: str | None
    perplexity: Interval
    against: TextAgainst | None
    confidence: float
    resamples: int
    seed: int
    versions: Mapping[str, str]
    compute_dtype: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What two records share of which the newer one replaces the older."""
        return self.name, self.split, self.length, self.against and self.against.name


@dataclass(frozen=True)
class TaskAgainst:
    """The dense model's `metrics` on the same documents, and the `difference`: sparse minus dense."""

    name: str
    weights: str | None
    metrics: Mapping[str, Score]
    difference: Mapping[str, Interval]


@dataclass(frozen=True)
class TaskRecord:
    """One task of lm-evaluation-harness, scored on `samples` documents."""

    name: str
    version: float | str | None
    shots: int
    limit: float | None
    samples: int
    weights: str | None
    metrics: Mapping[str, Score]
    against: TaskAgainst | None
    confidence: float
    resamples: int
    seed: int
    harness: str
    versions: Mapping[str, str]
    compute_dtype: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What two records share of which the newer one replaces the older."""
        return self.name, self.shots, self.limit, self.against and self.against.name


@dataclass(frozen=True)
class Metrics:
    """The recorded evaluations of a model, oldest first."""

    texts: tuple[TextRecord, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()

    def updated(self, newer: Metrics) -> Metrics:
        """Returns the records of both, a newer one in place of an older one with the same key."""
        return Metrics(_updated(self.texts, newer.texts), _updated(self.tasks, newer.tasks))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return {"version": VERSION, "texts": [_plain(x) for x in self.texts], "tasks": [_plain(x) for x in self.tasks]}

    @classmethod
    def from_dict(cls, data: Any) -> Metrics:
        """Returns the records that `to_dict` wrote; `ValueError` when `data` is something else."""
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"recorded evaluations of version {VERSION} are expected, not {version!r}; evaluate again, or update hf_sparsity"
            )
        try:
            return cls(tuple(map(_text, data["texts"])), tuple(map(_task, data["tasks"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a record of evaluations: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `METRICS_FILE` into a folder, whole or not at all; returns its path."""
        path = Path(folder) / METRICS_FILE
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Metrics:
        """Reads a folder's `METRICS_FILE`, or a file; without a file there are no records.

        Raises:
            ValueError: a truncated or altered file; the message names it.
        """
        path = Path(path)
        path = path / METRICS_FILE if path.is_dir() else path
        if not path.exists():
            return cls()
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _plain(record: TextRecord | TaskRecord) -> dict[str, Any]:
    """Returns JSON types; the precision of computing only where there was a choice."""
    return {key: value for key, value in asdict(record).items() if key != "compute_dtype" or value}


def _updated(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple({record.key: record for record in (*old, *new)}.values())


def _text(data: Mapping[str, Any]) -> TextRecord:
    against = data["against"]
    if against is not None:
        against = TextAgainst(
            **{**against, **{name: Interval(**against[name]) for name in ("perplexity", "ratio", "kl", "top1")}}
        )
    return TextRecord(**{**_checked(data), "perplexity": Interval(**data["perplexity"]), "against": against})


def _task(data: Mapping[str, Any]) -> TaskRecord:
    against = data["against"]
    if against is not None:
        difference = {name: Interval(**one) for name, one in against["difference"].items()}
        against = TaskAgainst(**{**against, "metrics": _scores(against["metrics"]), "difference": difference})
    return TaskRecord(**{**_checked(data), "metrics": _scores(data["metrics"]), "against": against})


def _scores(data: Mapping[str, Any]) -> dict[str, Score]:
    return {name: Score(**one) for name, one in data.items()}


_COUNTS = ("length", "windows", "documents", "predictions", "samples", "shots", "resamples", "seed")


def _checked(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the same data, whose plain fields have the types that readers rely on; `ValueError` otherwise."""
    for name in {"name", "unit", "harness", "compute_dtype"} & set(data):
        if not isinstance(data[name], str):
            raise ValueError(f"{name} of a recorded evaluation is {data[name]!r}; text is expected")
    for name in set(_COUNTS) & set(data):
        if isinstance(data[name], bool) or not isinstance(data[name], int):
            raise ValueError(f"{name} of a recorded evaluation is {data[name]!r}; a whole number is expected")
    return data
