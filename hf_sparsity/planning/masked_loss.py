"""The calibration loss of a model masked to given sparsities, cheaply and without writing a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Layer, Pattern, Pruner
from ..checkpoint.journal import Journal, digest, remembered
from ..core.nested_masks import mask_levels
from ..core.stats import STATS
from ..distributed import Processes
from ..evaluation.perplexity import next_token_loss
from ..model.inference import Batch
from ..model.layers import ModelLayers
from ..model.offload import lent_weights
from ..streaming.run import PassOptions
from ..streaming.stream import stream_blocks


class MaskedLoss:
    """A function from sparsities to the mean cross-entropy of the next token, each layer masked to its sparsity.

    Weights are scored once, on the dense model; one byte for each weight, the number of grid points at which it is still
    kept, gives the nested masks of all grid points. A call is one forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        model_layers: ModelLayers,
        scored_on: Sequence[Batch],
        judged_on: Sequence[Batch],
        pruner: Pruner,
        steps: int,
        pattern: Pattern,
        run: PassOptions | None = None,
    ):
        """Scores the weights.

        Args:
            scored_on: batches for the pruner's statistics; with several processes, this one's.
            judged_on: batches on which the loss is computed, all of them.
            steps: at most 255; sparsities are rounded to multiples of `1 / steps`. The group of an N:M pattern.
        """
        self._model, self._layout, self._batches, self._steps = model, model_layers, judged_on, steps
        self._levels: dict[str, Tensor] = {}
        needs, lent = pruner.needs & STATS, lent_weights(model_layers)
        for block in stream_blocks(model, model_layers, scored_on if needs else [], needs, rewrites=False, run=run):
            for name, layer in block.layers.items():
                scores = pruner.scores(layer) if layer.stats is not None or not needs else layer.weight.abs().float()
                masks = (_mask(pruner, layer, scores, step / steps, pattern) for step in range(1, steps))
                levels = mask_levels(masks, layer.weight)
                self._levels[name] = levels.cpu() if name in lent else levels

    def __call__(self, sparsities: Mapping[str, float]) -> float:
        """Returns the loss in nats a token; `sparsities` in [0, 1) of each layer are rounded to the grid."""
        total, count = 0.0, 0

        def judge(batch: Batch, output: Any) -> None:
            nonlocal total, count
            loss, tokens = next_token_loss(batch, output.logits)
            total, count = total + loss, count + tokens

        for block in stream_blocks(
            self._model, self._layout, self._batches, frozenset(), rewrites=True, after_last=judge
        ):
            for name in block.layers:
                step = round(sparsities[name] * self._steps)
                if step:
                    block.mask(name, self._levels[name] >= step)
        return total / count


def _mask(pruner: Pruner, layer: Layer, scores: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    layer.sparsity, layer.pattern = sparsity, pattern.at(sparsity)
    return pruner.mask(layer, scores)


class Candidates:
    """Computes the losses of candidates, shared out among the processes and remembered in the journal."""

    def __init__(self, loss: MaskedLoss, processes: Processes, journal: Journal | None):
        self._loss, self._processes, self._journal = loss, processes, journal

    def one(self, candidate: Mapping[str, float]) -> float:
        """Returns the loss of one candidate."""
        return self([candidate])[0]

    def __call__(self, candidates: Sequence[Mapping[str, float]]) -> list[float]:
        """Returns the losses in the order of the candidates."""
        names = [digest(candidate) for candidate in candidates]
        items = dict(zip(names, candidates, strict=True))
        losses = remembered(self._journal, self._processes, "loss", items, self._loss)
        return [losses[name] for name in names]
