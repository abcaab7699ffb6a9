"""How far a pruned model departs from the dense one, on each source of a calibration mix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from ..calibration.splits import HeldOut
from ..model.layers import ModelLayers
from ..records import SourcePlans, SourceScore
from .divergence import DenseReference, PlanScores


class SourceScores:
    """Scores of a model on each source of a calibration mix: dense when it is made, pruned when `report` is called."""

    def __init__(self, model: PreTrainedModel, model_layers: ModelLayers, heldout: HeldOut):
        """Runs the dense model and keeps hidden states of all tokens, `[tokens, width]`; `ValueError` without logits."""
        self._heldout, self._reference = heldout, DenseReference(model, model_layers, heldout.batches)
        self._dense = PlanScores.of(self._reference.rows())

    def report(self) -> dict[str, SourceScore]:
        """Returns the scores of the model as it is now, by source."""
        pruned = PlanScores.of(self._reference.rows())
        scores: dict[str, SourceScore] = {}
        for name, rows in rows_of(self._heldout.sources, self._heldout.weights).items():
            now, before = part(pruned, rows), part(self._dense, rows)
            scores[name] = SourceScore(
                weight=self._heldout.weights[name],
                sequences=len(rows),
                predictions=int(now.tokens.sum()),
                kl=now.mean(),
                dense=before.perplexity,
                pruned=now.perplexity,
            )
        return scores


def compare_by_source(sources: Sequence[str], uniform: PlanScores, chosen: PlanScores) -> dict[str, SourcePlans]:
    """Returns the KL divergence of two plans on each source."""
    return {
        name: SourcePlans(len(rows), part(uniform, rows).mean(), part(chosen, rows).mean())
        for name, rows in rows_of(sources, dict.fromkeys(sources)).items()
    }


def rows_of(sources: Sequence[str], order: Iterable[str]) -> dict[str, list[int]]:
    """Returns the numbers of each source's sequences, without the sources that have none."""
    return {name: rows for name in order if (rows := [i for i, source in enumerate(sources) if source == name])}


def part(scores: PlanScores, rows: list[int]) -> PlanScores:
    """Returns the scores of some of the sequences."""
    return PlanScores(scores.kl[rows], scores.loss[rows], scores.tokens[rows])
