"""Passes of `Allocator.measure` over a model, and what has to hold of a block before an algorithm sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..algorithm import FISHER, SCORES, Allocator, Pattern, Pruner
from ..config import SparsityConfig
from ..core.stats import STATS, InputStats
from .drive import Batch
from .fisher import fisher_information
from .journal import Journal, digest
from .layers import Layout
from .processes import Processes
from .run import Run, progress
from .stream import StreamedBlock, stream_blocks

FEWEST_TOKENS = 16  # an expert that saw fewer is pruned by magnitude: its norms would be noise


@dataclass(frozen=True)
class Measuring:
    """Passes of `allocator.measure` in model order over `data`, which the processes share."""

    model: PreTrainedModel
    layout: Layout
    data: list[Batch]
    config: SparsityConfig
    needs: frozenset[str]
    run: Run
    journal: Journal | None

    @property
    def batches(self) -> list[Batch]:
        """This process's."""
        return share(self.data, self.run.processes)

    def first(self) -> list[dict[str, Any]]:
        """Over the dense model; remembered, block by block where no inputs are needed."""
        allocator, _ = algorithms(self.config)
        if type(allocator).measure is Allocator.measure:
            return [dict.fromkeys(block.weights) for block in self.layout.blocks if block.weights]
        if not self.needs & (STATS | {FISHER}):
            return self._without_inputs()
        if self.journal is None:
            return self._pass()
        return list(self.journal.once("measures", "", self._pass))

    def again(self, sparsities: Mapping[str, float]) -> list[dict[str, Any]]:
        """Over the model masked to `sparsities`."""
        if self.journal is None:
            return self._pass(sparsities)
        return list(self.journal.once("remeasured", digest(sparsities), lambda: self._pass(sparsities)))

    def _without_inputs(self) -> list[dict[str, Any]]:
        """The blocks are shared out among the processes."""
        names = {index: block.name for index, block in enumerate(self.layout.blocks) if block.weights}
        known = {i: self.journal.recall("measure", name) for i, name in names.items()} if self.journal else {}
        todo = [index for index in names if known.get(index) is None]
        mine = dict(self._blocks(None, only=self.run.processes.share(todo)))
        if self.run.processes.count > 1:
            mine = {int(i): value for part in self.run.processes.gather(mine) for i, value in part.items()}
        return [known[index] if index not in mine else mine[index] for index in names]

    def _pass(self, sparsities: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        measures = dict(self._blocks(sparsities))
        return [measures[index] for index in sorted(measures)]

    def _blocks(
        self, sparsities: Mapping[str, float] | None, only: list[int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        allocator, pruner = algorithms(self.config)
        pattern = Pattern.parse(self.config.pattern)
        fisher = {}
        if FISHER in self.needs and sparsities is None:
            fisher = fisher_information(self.model, self.layout, self.data, self.run.processes)
        stats = self.needs & STATS
        stream = stream_blocks(
            self.model,
            self.layout,
            self.batches if stats else [],
            stats,
            rewrites=sparsities is not None,
            run=self.run,
            only=only,
        )
        title = f"Measuring ({allocator.name})"
        for block in progress(stream, self.layout, title, self.run, self.batches if stats else []):
            check_finite(block)
            fall_back(block, self.layout, stats)
            for name, layer in block.layers.items():
                layer.fisher = fisher.get(name)
                if SCORES in allocator.needs:
                    layer.scores = pruner.scores(layer)
                layer.pattern = pattern
            measure = allocator.measure(block.layers, pruner)
            if only is not None and self.journal is not None:
                self.journal.remember("measure", block.name, measure)
            yield block.index, measure
            for name, layer in block.layers.items() if sparsities is not None else ():
                layer.sparsity = sparsities[name]  # type: ignore[index]
                layer.pattern = pattern.at(layer.sparsity)
                scores = pruner.scores(layer) if layer.scores is None else layer.scores
                block.mask(name, pruner.mask(layer, scores))


def algorithms(config: SparsityConfig) -> tuple[Allocator, Pruner]:
    """The config's allocator and pruner, as instances."""
    assert isinstance(config.allocator, Allocator) and isinstance(config.pruner, Pruner)  # SparsityConfig resolved them
    return config.allocator, config.pruner


def share(data: list[Batch], processes: Processes) -> list[Batch]:
    """This process's batches; `ValueError` when there are fewer than processes."""
    if data and len(data) < processes.count:
        raise ValueError(
            f"{len(data)} calibration batches cannot be shared by {processes.count} processes; give more sequences"
        )
    return processes.share(data)


def fall_back(block: StreamedBlock, layout: Layout, needs: frozenset[str]) -> dict[str, str]:
    """Gives layers without enough inputs flat statistics, so that a score is the weight's magnitude; says which and why."""
    if not needs:
        return {}
    weights = layout.blocks[block.index].weights
    known = [layer.stats.norms.mean() for layer in block.layers.values() if layer.stats is not None]
    level = float(torch.stack([k.cpu() for k in known]).mean()) if known else 1.0
    notes = {}
    for name, layer in block.layers.items():
        tokens = layer.stats.tokens if layer.stats is not None else 0
        if tokens == 0:
            notes[name] = "pruned by magnitude: no calibration token reached it"
        elif weights[name].expert is not None and tokens < FEWEST_TOKENS:
            notes[name] = f"pruned by magnitude: only {tokens} calibration tokens were routed to it"
        else:
            continue
        layer.stats = InputStats.flat(needs, layer.weight.shape[1], level, layer.weight.device, tokens)
    return notes


def check_finite(block: StreamedBlock) -> None:
    """`ValueError` for NaN or infinity in a block's weights or inputs."""
    for name, layer in block.layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")
        stats = layer.stats
        if stats is not None and stats.tokens and not torch.isfinite(stats.norms).all():
            raise ValueError(
                f"the inputs of {name} are NaN or infinite: the model overflows in {layer.weight.dtype} on this data; load it in bfloat16 or float32"
            )
