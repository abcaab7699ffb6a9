"""How far a pruned model departs from the dense one, on each source of a calibration mix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..calibration.splits import HeldOut
from ..model.layers import ModelLayers
from .divergence import DenseReference, PlanScores


class SourceScores:
    """Sees a dense model before it is pruned, and says afterwards what became of it on each source."""

    def __init__(self, model: PreTrainedModel, model_layers: ModelLayers, apart: HeldOut):
        """Runs the model, dense; keeps hidden states of all tokens, tokens x width. `ValueError` without logits."""
        self._apart, self._reference = apart, DenseReference(model, model_layers, apart.batches)
        self._dense = PlanScores.of(self._reference.rows())

    def report(self) -> dict[str, dict[str, Any]]:
        """Returns the scores of the model as it is now, by source: see `plan.Report`."""
        pruned = PlanScores.of(self._reference.rows())
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


def compare_by_source(sources: Sequence[str], uniform: PlanScores, chosen: PlanScores) -> dict[str, dict[str, Any]]:
    """What two plans have of each source, KL in nats a token, on the same sequences: `{name: {"sequences", "uniform", "chosen"}}`."""
    return {
        name: {"sequences": len(rows), "uniform": part(uniform, rows).mean(), "chosen": part(chosen, rows).mean()}
        for name, rows in rows_of(sources, dict.fromkeys(sources)).items()
    }


def rows_of(sources: Sequence[str], order: Iterable[str]) -> dict[str, list[int]]:
    """Returns the sequences of each source that has any."""
    return {name: rows for name in order if (rows := [i for i, one in enumerate(sources) if one == name])}


def part(scores: PlanScores, rows: list[int]) -> PlanScores:
    """Returns the scores of some of the sequences."""
    return PlanScores(scores.kl[rows], scores.loss[rows], scores.tokens[rows])
