"""How far a pruned model departs from the dense one, on each source of a calibration mix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .drive import Batch
from .judge import Reference, Scores
from .layers import Layout
from .mixture import Mixture

SHARE = 8  # one of so many sequences of each source is judged by


@dataclass(frozen=True)
class Apart:
    """Sequences of a mix that pruning never sees, the source of each, and the sources' shares."""

    batches: list[Batch]
    sources: list[str]
    weights: Mapping[str, float]


def keep_apart(
    given: Any, data: Sequence[Batch], certificate: Sequence[Batch] = ()
) -> tuple[list[Batch], Apart | None]:
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
        taken += (kept or own)[-max(1, len(own) // SHARE) :]
    taken.sort()
    rest = [batch for i, batch in enumerate(data) if i not in set(taken)]
    if not rest:
        raise ValueError(
            f"a mix of {len(given)} sequences has none left to prune with, once one of each source is kept apart"
        )
    return rest, Apart([whole[i] for i in taken], [given.sources[i] for i in taken], given.weights)


class SourceWitness:
    """Sees a dense model before it is pruned, and says afterwards what became of it on each source."""

    def __init__(self, model: PreTrainedModel, layout: Layout, apart: Apart):
        """Runs the model, dense; keeps hidden states of all tokens, tokens x width. `ValueError` without logits."""
        self._apart, self._reference = apart, Reference(model, layout, apart.batches)
        self._dense = Scores.of(self._reference.rows())

    def report(self) -> dict[str, dict[str, Any]]:
        """Of the model as it is now, by source: see `plan.Report`."""
        pruned = Scores.of(self._reference.rows())
        result: dict[str, dict[str, Any]] = {}
        for name, rows in rows_of(self._apart.sources, self._apart.weights).items():
            now, before = part(pruned, rows), part(self._dense, rows)
            result[name] = {
                "weight": self._apart.weights[name],
                "sequences": len(rows),
                "predictions": int(now.tokens.sum()),
                "kl": now.mean(),
                "perplexity": {"dense": before.perplexity, "pruned": now.perplexity},
            }
        return result


def compare_by_source(sources: Sequence[str], uniform: Scores, chosen: Scores) -> dict[str, dict[str, Any]]:
    """What two plans have of each source, KL in nats a token, on the same sequences: `{name: {"sequences", "uniform", "chosen"}}`."""
    return {
        name: {"sequences": len(rows), "uniform": part(uniform, rows).mean(), "chosen": part(chosen, rows).mean()}
        for name, rows in rows_of(sources, dict.fromkeys(sources)).items()
    }


def rows_of(sources: Sequence[str], order: Iterable[str]) -> dict[str, list[int]]:
    """Which sequences each source has, of those that have any."""
    return {name: rows for name in order if (rows := [i for i, one in enumerate(sources) if one == name])}


def part(scores: Scores, rows: list[int]) -> Scores:
    """Of some of the sequences."""
    return Scores(scores.kl[rows], scores.loss[rows], scores.tokens[rows])
