"""Prune the layers of one block, on one process or several."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..algorithm import SCORES, Layer, Pruner, RowAllocator
from ..distributed import Processes, owners
from ..model.devices import empty_caches
from ..model.sparsity import mask_hash
from ..plan import LARGEST_DEVIATION, LARGEST_EXCESS, LayerReport
from ..pruners import PRUNERS
from ..streaming.run import Progress
from ..streaming.stream import StreamedBlock
from .refinement import Refinement

# New weights and reports, by layer.
Pruned: TypeAlias = "tuple[dict[str, Tensor], dict[str, LayerReport]]"


def prune_block(
    block: StreamedBlock,
    pruner: Pruner,
    rows: RowAllocator | None,
    fallbacks: Mapping[str, str],
    processes: Processes,
    progress: Progress,
    refine: Refinement,
) -> dict[str, LayerReport]:
    """Prunes the layers of a block, each group on one of the processes, writes them on all, and returns their reports."""
    groups = list(_sharing(block.layers.values()))
    owner = owners(groups, processes.count)
    reports: dict[str, LayerReport] = {}
    new: dict[str, Tensor] = {}
    for group, rank in zip(groups, owner, strict=True):
        progress.say(f"layer {len(reports) + 1} of {len(block.layers)}")
        if rank == processes.rank:
            pruned, pruned_reports = _with_room(block, partial(_prune_group, group, pruner, rows, fallbacks, refine))
            reports |= pruned_reports
            if processes.count == 1:
                for name, weight in pruned.items():
                    block.write(name, weight)
            else:
                new |= pruned
    if processes.count > 1:
        ranks = {layer.name: rank for group, rank in zip(groups, owner, strict=True) for layer in group}
        for name, weight in processes.exchange(new, ranks, {n: layer.weight for n, layer in block.layers.items()}):
            block.write(name, weight)
        parts = processes.gather({name: dataclasses.asdict(report) for name, report in reports.items()})
        reports = {name: LayerReport(**layer) for part in parts for name, layer in part.items()}
    return reports


def _with_room(block: StreamedBlock, work: Callable[[], Pruned]) -> Pruned:
    """Returns what `work` does; where the device is full, once more after the inputs of waiting batches have left it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if not block.make_room():
            raise
    empty_caches({layer.weight.device for layer in block.layers.values()})
    return work()


def _prune_group(
    group: list[Layer],
    pruner: Pruner,
    rows: RowAllocator | None,
    fallbacks: Mapping[str, str],
    refine: Refinement,
) -> Pruned:
    """The new weights of layers that share their inputs, and their reports."""
    start = time.perf_counter()
    for layer in group:
        if rows is not None and layer.sparsity > 0 and layer.name not in fallbacks:
            layer.scores = pruner.scores(layer) if SCORES in rows.needs else None
            layer.rows = rows.rows(layer)
    pruned, notes = _best_of(group, pruner, fallbacks)
    refined = [refine(layer, weight) for layer, weight in zip(group, pruned, strict=True)]
    solved = (time.perf_counter() - start) / len(group)
    weights, reports = {}, {}
    for layer, left, weight in zip(group, pruned, refined, strict=True):
        if not torch.isfinite(weight).all():
            raise RuntimeError(f"{layer.name}: pruning gave NaN or infinite weights; the layer was left as it was")
        zeros, size = weight.numel() - int(torch.count_nonzero(weight)), weight.numel()
        allowed = LARGEST_DEVIATION + 1 / weight.shape[1]
        if zeros / size < layer.sparsity - allowed:
            raise RuntimeError(
                f"{layer.name}: {zeros / size:.4f} of its weights became zero where the plan wants {layer.sparsity:.4f}"
            )
        note = notes.get(layer.name, "")
        if not note and zeros / size > layer.sparsity + LARGEST_EXCESS:
            note = f"sparser than planned ({zeros / size:.3f}, not {layer.sparsity:.3f}): equal weights, or some were zero before"
        error = _output_error(layer, weight)
        before = _output_error(layer, left) if refine.refit else None
        swapped = int(((weight != 0) & (left == 0)).sum()) if refine.swaps else None
        tokens = layer.stats.tokens if layer.stats is not None else None
        layer.scores = layer.rows = None
        weights[layer.name] = weight
        mask = mask_hash(weight)
        reports[layer.name] = LayerReport(
            zeros, size, layer.sparsity, error, tokens, round(solved, 6), note, mask, before, swapped
        )
    return weights, reports


def _best_of(group: list[Layer], pruner: Pruner, fallbacks: Mapping[str, str]) -> tuple[list[Tensor], dict[str, str]]:
    """The new weights of layers that share their inputs, and notes: where the pruner names a cheaper one, the better of both."""
    pruned, notes = pruner.prune_together(group), {n: note for n, note in fallbacks.items() if note}
    if not pruner.checked_against:
        return pruned, notes
    others = PRUNERS[pruner.checked_against]().prune_together(group)
    for index, (layer, mine, other) in enumerate(zip(group, pruned, others, strict=True)):
        mine_error, other_error = _output_error(layer, mine), _output_error(layer, other)
        if mine_error is not None and other_error is not None and other_error < mine_error:
            pruned[index] = other
            notes.setdefault(layer.name, f"{pruner.checked_against}'s result was taken: its output error is lower")
    return pruned, notes


def _output_error(layer: Layer, weight: Tensor) -> float | None:
    """‖(W − W′)X‖² / ‖WX‖², from the Gram matrix or else the column norms; None without data."""
    if layer.stats is None:
        return None
    before = layer.weight.to(torch.float32)
    whole = layer.stats.energy(before)
    return max(0.0, layer.stats.energy(before - weight.to(torch.float32)) / whole) if whole > 0 else 0.0


def _sharing(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """Groups layers that share one `stats`, in order."""
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.stats) if layer.stats is not None else id(layer), []).append(layer)
    yield from groups.values()
