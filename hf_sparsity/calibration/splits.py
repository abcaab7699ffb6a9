"""What each calibration sequence is for: statistics, the choice of a plan, its certificate, or judging by source."""

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
    batches: Any, data: Sequence[Batch], certificate: Sequence[Batch] = ()
) -> tuple[list[Batch], HeldOut | None]:
    """Splits the sequences of a mix: returns (those to measure and prune with, those held out).

    The last eighth of each source is held out, at least one sequence.

    Args:
        batches: what the caller passed; unless it is a `Mixture`, nothing is held out.
        data: its prepared batches, in order.
        certificate: the batches behind them, which are held out already; no more is taken of sources that they hold.

    Raises:
        ValueError: nothing would be left to prune with.
    """
    whole = [*data, *certificate]
    if not isinstance(batches, Mixture) or not whole:
        return list(data), None
    taken: list[int] = []
    for name in batches.weights:
        own = [i for i, source in enumerate(batches.sources) if source == name]
        kept = [i for i in own if i >= len(data)]
        taken += (kept or own)[-max(1, len(own) // HELD_OUT_SHARE) :]
    taken.sort()
    rest = [batch for i, batch in enumerate(data) if i not in set(taken)]
    if not rest:
        raise ValueError(
            f"a mix of {len(batches)} sequences has none left to prune with, once one of each source is held out"
        )
    return rest, HeldOut([whole[i] for i in taken], [batches.sources[i] for i in taken], batches.weights)


FEWEST_SEQUENCES = 8  # sequences of a race: two to certify, three to choose by, three for statistics


@dataclass(frozen=True)
class Split:
    """Calibration batches by what they are for, in order: the pruner's statistics, the choice, the certificate."""

    statistics: list[Batch]
    selection: list[Batch]
    certificate: list[Batch]

    @classmethod
    def of(cls, data: Sequence[Batch], most: int) -> Split:
        """Splits calibration batches: a quarter certifies, three eighths choose, neither with more than `most` tokens.

        Raises `ValueError` for fewer than `FEWEST_SEQUENCES`.
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
    """Returns (batches to prune with, batches of the certificate), where these are the data that a plan was chosen on.

    Of other data, all are to prune with.
    """
    facts = (chosen or {}).get("data", {})
    count = facts.get("certificate", 0) if isinstance(facts, Mapping) else 0
    if not data or not isinstance(count, int) or not 0 < count < len(data):
        return list(data), []
    if facts.get("sha256") != data_fingerprint(data)["sha256"]:
        return list(data), []
    return list(data[:-count]), list(data[-count:])
