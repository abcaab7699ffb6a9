"""Calibration text of several sources: how many sequences each gives, and in which order they come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from ..validation import check_number

SELF = "self"  # as data: the model's own samples
LEAST = 2  # sequences that each source gives at least: one to prune with, one to judge by
_LONGEST = 100  # characters that a name may have


@dataclass(frozen=True, eq=False)
class Source:
    """One source of a calibration mix.

        calibration_data=[Source("c4", 0.5), Source("code.jsonl", 0.3, name="code"), Source("self", 0.2)]

    Args:
        data: whatever `calibration_batches` takes; `"self"` for samples of the model itself.
        weight: its share of the sequences, relative to the other weights.
        name: what the report calls it; by default that of the file or the dataset.
        column, split: of a dataset, by default as given for all.

    Raises:
        ValueError: no data, a weight that is no number above 0, a name that is no line of text.
    """

    data: Any
    weight: float = 1.0
    name: str | None = None
    column: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.data is None or isinstance(self.data, Source):
            raise ValueError(f"a source's data is {self.data!r}; texts, a file, a dataset or 'self' are expected")
        check_number(f"source {self.called}: weight", self.weight, "(0, inf)")
        name = self.name
        if name is not None and not (isinstance(name, str) and name.strip() == name and 0 < len(name) <= _LONGEST):
            raise ValueError(f"a source's name is {name!r}; a text of 1 to {_LONGEST} characters is expected")
        if name is not None and not name.isprintable():
            raise ValueError(f"a source's name is {name!r}; one line of text is expected")

    @property
    def called(self) -> str:
        """The source's name, or one made from its data; "source" where these have none."""
        if self.name is not None:
            return self.name
        if not isinstance(self.data, (str, Path)):
            return "source"
        path = Path(self.data)
        return (path.name if path.suffix or path.is_absolute() else str(self.data))[:_LONGEST]

    @property
    def is_self(self) -> bool:
        """True if it is the model's own samples."""
        return isinstance(self.data, str) and self.data == SELF


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sequences of several sources, mixed: `ids` `[sequences, tokens]`, int64, and for each sequence its source's name.

    It can be given wherever calibration ids can; `make_plan` and `prune` hold out an eighth of each source then, and the
    report says how far the pruned model departs from the dense one there. `weights`: share of each source, in [0, 1].
    """

    ids: Tensor
    sources: tuple[str, ...]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or len(self.ids) != len(self.sources):
            raise ValueError(f"ids {list(self.ids.shape)} do not go with {len(self.sources)} names of sources")
        if unknown := set(self.sources) - set(self.weights):
            raise ValueError(f"no weight is given for the sources {', '.join(sorted(unknown))}")

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, which: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, which: slice) -> Mixture: ...
    def __getitem__(self, which: int | slice) -> dict[str, Tensor] | Mixture:
        """Returns one sequence as the model takes it, or some of them with their names as a `Mixture`."""
        if isinstance(which, slice):
            return Mixture(self.ids[which], self.sources[which], self.weights)
        return {"input_ids": self.ids[which][None]}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))


def sources_in(data: Any, column: str | None = None) -> list[Source] | None:
    """Returns the sources, if the data are a `Source` or a list of them (or of dicts of their fields), else None.

    Dicts with a field that `column` names are documents.

    Raises:
        ValueError: sources among other things; two of one name.
    """
    if isinstance(data, Source):
        return [data]
    if not isinstance(data, (list, tuple)) or not any(_is_source(entry, column) for entry in data):
        return None
    sources: list[Source] = []
    for number, entry in enumerate(data):
        if not _is_source(entry, column):
            if not any(isinstance(other, Source) for other in data):
                return None  # documents, some of which have a field "data"
            raise ValueError(
                f"entry {number} of the calibration mix is a {type(entry).__name__}; write Source(data, weight)"
            )
        sources.append(entry if isinstance(entry, Source) else Source(**entry))
    called = [source.name for source in sources if source.name is not None]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise ValueError(f"two sources of the calibration mix are called {twice!r}; give them different names")
    return sources


def _is_source(entry: Any, column: str | None) -> bool:
    if isinstance(entry, Mapping):
        return "data" in entry and column != "data" and set(entry) <= {field.name for field in fields(Source)}
    return isinstance(entry, Source)


def names(sources: Sequence[Source]) -> list[str]:
    """Returns a different name for each source: names made from the data are numbered where they repeat."""
    taken = {source.name for source in sources if source.name is not None}
    result: list[str] = []
    for source in sources:
        name, number = source.called, 1
        while source.name is None and name in taken:
            number += 1
            name = f"{source.called} {number}"
        taken.add(name)
        result.append(name)
    return result


def counts(weights: Sequence[float], total: int) -> list[int]:
    """Returns how many sequences each source gives: shares of `total` by the largest remainder, at least `LEAST` each.

    Raises:
        ValueError: `total` is too small for `LEAST` each.
    """
    if total < LEAST * len(weights):
        raise ValueError(
            f"{total} sequences are too few for a mix of {len(weights)} sources: each needs one to prune with and one to "
            f"judge by; give sequences={LEAST * len(weights)} or more"
        )
    parts = [Fraction(str(weight)) for weight in weights]  # decimals as they were written, so that ties are ties
    exact = [part * total / sum(parts) for part in parts]
    result = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: result[i] - exact[i])
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    while min(result) < LEAST:
        result[result.index(max(result))] -= 1
        result[result.index(min(result))] += 1
    return result


def interleaved(sizes: Sequence[int]) -> list[int]:
    """Returns the source of each position: always the one furthest behind its share, so that every stretch holds the mix."""
    total, given, order = sum(sizes), [0] * len(sizes), []
    for length in range(1, total + 1):
        behind = [size * length - total * have for size, have in zip(sizes, given, strict=True)]
        source = behind.index(max(behind))
        given[source] += 1
        order.append(source)
    return order
