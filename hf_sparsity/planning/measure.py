"""Passes of `Allocator.measure` over a model, which the processes share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..algorithm import FISHER, LOSS, SCORES, Allocator, Pattern, Pruner
from ..checkpoint.journal import Journal, digest
from ..core.stats import STATS
from ..distributed import share
from ..model.inference import Batch
from ..model.layers import ModelLayers
from ..streaming.fallback import check_finite, fall_back
from ..streaming.run import PassOptions, Progress
from ..streaming.stream import stream_blocks
from .fisher import fisher_information


def needed(allocator: Allocator, pruner: Pruner) -> frozenset[str]:
    """Returns the facts that an allocator uses, and those that the pruner uses if the allocator looks at its scores."""
    return allocator.needs | (pruner.needs if allocator.needs & {SCORES, LOSS} else frozenset())


@dataclass(frozen=True)
class Measuring:
    """Passes of `allocator.measure` over the blocks in model order, on `data`, which the processes share."""

    model: PreTrainedModel
    model_layers: ModelLayers
    data: list[Batch]
    allocator: Allocator
    pruner: Pruner
    pattern: Pattern
    run: PassOptions
    journal: Journal | None
    notes: dict[str, str] = field(default_factory=dict)  # layers measured by magnitude only -> the reason

    @property
    def needs(self) -> frozenset[str]:
        """The facts that the allocator uses, see `needed`."""
        return needed(self.allocator, self.pruner)

    @property
    def batches(self) -> list[Batch]:
        """The batches of this process."""
        return share(self.data, self.run.processes)

    def first(self) -> list[dict[str, Any]]:
        """Measures the dense model; what was measured is remembered, block by block where no inputs are needed."""
        if type(self.allocator).measure is Allocator.measure:
            return [dict.fromkeys(block.weights) for block in self.model_layers.blocks if block.weights]
        if not self.needs & (STATS | {FISHER}):
            return self._without_inputs()
        if self.journal is None:
            return self._pass()
        measures = list(self.journal.once("measures", "", self._pass))
        self.notes.update(self.journal.once("unseen", "", lambda: dict(self.notes)))
        return measures

    def again(self, sparsities: Mapping[str, float]) -> list[dict[str, Any]]:
        """Measures the model masked to `sparsities`."""
        if self.journal is None:
            return self._pass(sparsities)
        return list(self.journal.once("remeasured", digest(sparsities), lambda: self._pass(sparsities)))

    def _without_inputs(self) -> list[dict[str, Any]]:
        """Measures weights alone; the blocks are shared out among the processes."""
        names = {index: block.name for index, block in enumerate(self.model_layers.blocks) if block.weights}
        recorded = {i: self.journal.recall("measure", name) for i, name in names.items()} if self.journal else {}
        todo = [index for index in names if recorded.get(index) is None]
        mine = dict(self._blocks(None, only=self.run.processes.share(todo)))
        if self.run.processes.count > 1:
            mine = {int(i): value for part in self.run.processes.gather(mine) for i, value in part.items()}
        return [recorded[index] if index not in mine else mine[index] for index in names]

    def _pass(self, sparsities: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        measures = dict(self._blocks(sparsities))
        return [measures[index] for index in sorted(measures)]

    def _blocks(
        self, sparsities: Mapping[str, float] | None, only: list[int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        allocator, pruner = self.allocator, self.pruner
        fisher = {}
        if FISHER in self.needs and sparsities is None:
            fisher = fisher_information(self.model, self.model_layers, self.data, self.run.processes)
        stats = self.needs & STATS
        stream = stream_blocks(
            self.model,
            self.model_layers,
            self.batches if stats else [],
            stats,
            rewrites=sparsities is not None,
            run=self.run,
            only=only,
        )
        title = f"Measuring ({allocator.name})"
        progress = Progress(title, self.model_layers, self.run, self.batches if stats else [])
        for block in progress.over(stream):
            check_finite(block)
            self.notes.update(fall_back(block, self.model_layers, stats))
            for name, layer in block.layers.items():
                layer.fisher = fisher.get(name)
                if SCORES in allocator.needs:
                    layer.scores = pruner.scores(layer)
                layer.pattern = self.pattern
            measure = allocator.measure(block.layers, pruner)
            if only is not None and self.journal is not None:
                self.journal.remember("measure", block.name, measure)
            yield block.index, measure
            for name, layer in block.layers.items() if sparsities is not None else ():
                layer.sparsity = sparsities[name]  # type: ignore[index]
                layer.pattern = self.pattern.at(layer.sparsity)
                scores = pruner.scores(layer) if layer.scores is None else layer.scores
                block.mask(name, pruner.mask(layer, scores))
