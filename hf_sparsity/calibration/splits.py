"""Which calibration sequences do what: statistics, choice, certificate, held out by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.inference import Batch
from .batches import batch_tokens, data_fingerprint
from .mixture import Mixture

HELD_OUT_SHARE = 8  # of the sequences of each source, one in this many is held out


@dataclass(frozen=True)
class HeldOut:
    """Sequences of a mix that pruning never sees, the source of each, and the sources' shares."""

    batches: list[Batch]
    sources: list[str]
    weights: Mapping[str, float]


def hold_out(
    given: Any, data: Sequence[Batch], certificate: Sequence[Batch] = ()
) -> tuple[list[Batch], HeldOut | None]:
    """(what is left to measure and prune with, what is kept apart): of each source the last eighth, at least one sequence.

    Args:
        given: what the caller gave; unless it is a `Mixture`, nothing is kept apart.
        data: prepared, in its order.
        certificate: what follows it there and is kept apart already; of sources that it holds, no more is taken.

    Raises:
        ValueError: nothing would be left.
    """
    whole = [*data, *certificate]
    if not isinstance(given, Mixture) or not whole:
        return list(data), None
    taken: list[int] = []
    for name in given.weights:
        own = [i for i, source in enumerate(given.sources) if source == name]
        kept = [i for i in own if i >= len(data)]
        taken += (kept or own)[-max(1, len(own) // HELD_OUT_SHARE) :]
    taken.sort()
    rest = [batch for i, batch in enumerate(data) if i not in set(taken)]
    if not rest:
        raise ValueError(
            f"a mix of {len(given)} sequences has none left to prune with, once one of each source is kept apart"
        )
    return rest, HeldOut([whole[i] for i in taken], [given.sources[i] for i in taken], given.weights)


FEWEST_SEQUENCES = 8  # sequences: two to certify, three to choose by, three for statistics


@dataclass(frozen=True)
class Split:
    """Calibration batches, in their order: for the pruner's statistics, for the choice, for the certificate."""

    statistics: list[Batch]
    selection: list[Batch]
    certificate: list[Batch]

    @classmethod
    def of(cls, data: Sequence[Batch], most: int) -> Split:
        """A quarter certifies and three eighths choose, but neither with more than `most` tokens.

        `ValueError` for too few sequences.
        """
        if len(data) < FEWEST_SEQUENCES:
            raise ValueError(
                f"{len(data)} calibration sequences cannot be split into statistics, choice and certificate; give at least {FEWEST_SEQUENCES}"
            )
        rest = list(data)
        certificate = _last(rest, len(data) // 4, most)
        selection = _last(rest, len(data) * 3 // 8, most)
        return cls(rest, selection, certificate)

    def to_dict(self, data: Sequence[Batch]) -> dict[str, Any]:
        """Returns how many sequences each part has, and which data they are of."""
        counts = {name: len(part) for name, part in vars(self).items()}
        return {**counts, "sha256": data_fingerprint(data)["sha256"]}


def _last(rest: list[Batch], count: int, most: int) -> list[Batch]:
    """Takes up to `count` from the end, fewer where they exceed `most` tokens, but at least two."""
    taken: list[Batch] = []
    while len(taken) < count and (len(taken) < 2 or sum(map(batch_tokens, [*taken, rest[-1]])) <= most):
        taken.insert(0, rest.pop())
    return taken


def split_of(chosen: Mapping[str, Any] | None, data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(what may be pruned with, the certificate's) of the data that a plan was chosen on; of other data all and nothing."""
    facts = (chosen or {}).get("data", {})
    count = facts.get("certificate", 0) if isinstance(facts, Mapping) else 0
    if not data or not isinstance(count, int) or not 0 < count < len(data):
        return list(data), []
    if facts.get("sha256") != data_fingerprint(data)["sha256"]:
        return list(data), []
    return list(data[:-count]), list(data[-count:])
