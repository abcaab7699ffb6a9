"""One dense pass for everything that a race needs: what each allocator measures, and the ranks of all weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...algorithm import FISHER, SCORES, Allocator, Layer, Pattern, Pruner
from ...core.nested_masks import Ranks, rank_blocks, rank_masks, rank_rows
from ...core.stats import STATS
from ...distributed import Processes
from ...model.inference import Batch
from ...model.layers import ModelLayers
from ...model.offload import lent_weights
from ...streaming.fallback import check_finite, fall_back
from ...streaming.run import PassOptions, Progress
from ...streaming.stream import stream_blocks
from ..fisher import fisher_information

Measures = list[dict[str, Any]]  # {layer: measure} of each block, in model order


def survey(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    data: Sequence[Batch],
    *,
    allocators: Collection[Allocator],
    pruner: Pruner,
    pattern: Pattern,
    hidden_limit: int | None = None,
    notes: dict[str, str] | None = None,
) -> tuple[dict[Allocator, Measures], dict[str, Ranks]]:
    """Returns (what each allocator measures, block by block; the ranks of each layer's weights), from one dense pass.

    Each process does all of it over all the data: sums shared between processes differ in their last bits, and so would
    the plans. The ranks are where the weights are: of those that only come to their device for a while, on the host.
    """
    needs = pruner.needs.union(*(allocator.needs for allocator in allocators))
    fisher = fisher_information(model, model_layers, list(data), Processes()) if FISHER in needs else {}
    stats = needs & STATS
    run = PassOptions(hidden_limit=hidden_limit)
    batches = list(data) if stats else []
    stream = stream_blocks(model, model_layers, batches, stats, rewrites=False, run=run)
    measures: dict[Allocator, dict[int, dict[str, Any]]] = {allocator: {} for allocator in allocators}
    ranks: dict[str, Ranks] = {}
    lent = lent_weights(model_layers)
    for block in Progress("Measuring", model_layers, run, batches).over(stream):
        check_finite(block)
        reasons = fall_back(block, model_layers, stats)
        if notes is not None:
            notes.update(reasons)
        for name, layer in block.layers.items():
            layer.fisher, layer.pattern = fisher.get(name), pattern
            scores = pruner.scores(layer)
            ranks[name] = ranked(pruner, layer, scores)
            if name in lent:
                ranks[name] = replace(ranks[name], survives=ranks[name].survives.cpu())
            layer.scores = scores if SCORES in needs else None
        for allocator in allocators:
            measures[allocator][block.index] = allocator.measure(block.layers, pruner)
    in_model_order = {a: [blocks[index] for index in sorted(blocks)] for a, blocks in measures.items()}
    return in_model_order, ranks


def ranked(pruner: Pruner, layer: Layer, scores: Tensor) -> Ranks:
    """Returns the pruner's masks of a layer at all sparsities, by one sort where the pruner compares within cells."""
    cells = pruner.compared_within(layer)
    if cells is not None:
        return rank_blocks(scores, cells.columns) if cells.across_rows else rank_rows(scores, cells.columns)

    def mask_at(sparsity: float) -> Tensor:
        layer.sparsity = sparsity
        return pruner.mask(layer, scores)

    return rank_masks(mask_at, scores)
