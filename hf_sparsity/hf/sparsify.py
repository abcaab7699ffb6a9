"""The two verbs: `make_plan` decides, `prune` does. Each is one loop over `stream_blocks`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..algorithm import (
    FISHER,
    LOSS,
    REMEASURE,
    SCORES,
    Allocator,
    Layer,
    Pattern,
    Probe,
    Pruner,
    RowAllocator,
)
from ..config import SparsityConfig
from ..core import budget
from ..core.stats import STATS, InputStats
from ..plan import LayerPlan, LayerReport, Plan, Report
from .batches import fingerprint, prepare_batches
from .fisher import fisher_information
from .fit import check_plan, check_widths, model_fingerprint, plan_config, versions
from .layers import Layout, Weight, find_layout
from .probe import MaskedLoss
from .stream import Batch, StreamedBlock, stream_blocks

logger = logging.getLogger(__name__)

FEWEST_TOKENS = 16  # an expert that saw fewer is pruned by magnitude: its norms would be noise
LARGEST_DEVIATION = 0.005  # how far below its plan a layer may end, beside the rounding of whole weights per row


def make_plan(
    model: PreTrainedModel,
    config: SparsityConfig | Mapping[str, Any],
    batches: Tensor | Iterable[Mapping[str, Any]] | None = None,
) -> Plan:
    """Decides the sparsity of each layer; the model is unchanged.

    Args:
        model: a transformers model, in memory or dispatched by accelerate.
        config: what is wanted.
        batches: calibration data, see `prepare_batches`; may be None for allocators that look at weights only.

    Raises:
        ValueError: bad data, an N:M that does not divide a layer's width, missing calibration data.
    """
    config = SparsityConfig.from_dict(config) if isinstance(config, Mapping) else config
    allocator, pruner = _algorithms(config)
    layout = find_layout(model, config.ignore)
    pattern = Pattern.parse(config.pattern)
    check_widths(layout, pattern)
    sizes = {name: weight.size for name, weight in layout.weights.items()}
    target = float(config.sparsity)  # type: ignore[arg-type]

    needs = allocator.needs | (pruner.needs if allocator.needs & {SCORES, LOSS} else frozenset())
    data = prepare_batches(model, batches) if batches is not None else []
    wanting = needs & (STATS | {FISHER, LOSS})
    if wanting and not data:
        raise ValueError(
            f"allocator {allocator.name!r} measures {' and '.join(sorted(wanting))} and needs calibration data: pass batches"
        )

    probe = None
    fitness = data
    if LOSS in needs and len(data) > 1:  # candidates are judged on sequences that their scores never saw
        held = max(1, len(data) // 8)
        data, fitness = data[:-held], data[-held:]
    measures = _measure(model, layout, data, config, needs)
    if needs & {LOSS, REMEASURE}:
        steps: int = pattern.group or vars(allocator).get("steps", 16)
        loss = MaskedLoss(model, layout, data, fitness, pruner, steps, pattern) if LOSS in needs else None
        probe = Probe(
            seed=config.seed,
            loss=loss,
            remeasure=lambda sparsities: _measure(model, layout, data, config, needs, sparsities),
        )
    assigned = allocator.assign(measures, sizes, target, group=pattern.group, probe=probe)
    if set(assigned) != set(sizes):
        raise ValueError(f"allocator {allocator.name!r} returned other layers than it was given")
    assigned = _meet_target(assigned, sizes, target, pattern, allocator)
    numbers = {name: allocator.number(value) for block in measures for name, value in block.items()}
    layers = {
        name: _layer_plan(weight, assigned[name], pattern, numbers.get(name)) for name, weight in layout.weights.items()
    }
    plan = Plan(
        config=config.to_dict(),
        layers=layers,
        model=model_fingerprint(model, layout),
        data=fingerprint(data) if needs else None,
        versions=versions(),
        algorithms={"allocator": allocator, "pruner": pruner, "row_allocator": config.row_allocator},
    )
    plan.check_target()
    return plan


def prune(
    model: PreTrainedModel,
    plan: Plan,
    batches: Tensor | Iterable[Mapping[str, Any]] | None = None,
    *,
    pruner: Pruner | None = None,
) -> Report:
    """Carries out a plan, in place; the plan then stands in `model.config.sparsity_config`.

    Args:
        model: the model the plan was made for, or one of the same shapes.
        plan: made by `make_plan`, loaded, or edited.
        batches: calibration data, see `prepare_batches`; may be None for pruners that look at weights only.
        pruner: the instance, for a loaded plan that names a pruner from outside this package.

    Raises:
        ValueError: a plan for another model or that misses its target; bad or missing data.
        RuntimeError: a layer ended less sparse than planned.
    """
    start = time.perf_counter()
    config = plan_config(plan, pruner)
    _, pruner = _algorithms(config)
    rows = config.row_allocator
    assert rows is None or isinstance(rows, RowAllocator)
    layout = find_layout(model, config.ignore)
    check_plan(plan, model, layout)
    needs = (pruner.needs | (rows.needs if rows else frozenset())) & STATS
    if needs and batches is None:
        raise ValueError(
            f"pruner {pruner.name!r}{f' with {rows.name!r}' if rows else ''} needs calibration data: pass batches"
        )
    data = prepare_batches(model, batches) if needs and batches is not None else []
    _check_resident_weights(layout)

    reports: dict[str, LayerReport] = {}
    for block in _progress(stream_blocks(model, layout, data, needs, rewrites=True), layout, "Pruning"):
        _check_finite(block)
        fallbacks = _fall_back(block, layout, needs)
        for layer in block.layers.values():
            layer.sparsity = plan.layers[layer.name].sparsity
            layer.pattern = Pattern.parse(plan.layers[layer.name].pattern)
        for group in _sharing(block.layers.values()):
            reports |= _prune_group(block, group, pruner, rows, fallbacks)
    report = Report(
        target=plan.target,
        layers={name: reports[name] for name in layout.weights},
        skipped=layout.skipped,
        seconds=time.perf_counter() - start,
    )
    model.config.sparsity_config = plan.to_dict() | {
        "pruned": {"sparsity": report.sparsity, "data": fingerprint(data) if data else None, "versions": versions()}
    }
    for name, note in report.notes.items():
        logger.warning("%s: %s", name, note)
    return report


# ---- the steps of make_plan


def _meet_target(
    assigned: Mapping[str, float], sizes: Mapping[str, int], target: float, pattern: Pattern, allocator: Allocator
) -> dict[str, float]:
    """What the allocator wants, clamped and moved until the global sparsity is met exactly."""
    if not pattern.is_mixed:
        return budget.meet(assigned, sizes, target)
    assert pattern.group is not None
    ideal = assigned if allocator.mixes else budget.meet(assigned, sizes, target, high=1 - 1 / pattern.group)
    return budget.meet_groups(ideal, sizes, target, pattern.group)


def _layer_plan(weight: Weight, sparsity: float, pattern: Pattern, measure: float | None) -> LayerPlan:
    """Experts, of which there may be thousands, are rounded as the JSON writes them, so that nothing is lost there."""
    if weight.expert is not None:
        sparsity = round(sparsity, 9)
        measure = None if measure is None else float(f"{measure:.4g}")
    return LayerPlan(sparsity, weight.size, str(pattern.at(sparsity)), measure)


def _measure(
    model: PreTrainedModel,
    layout: Layout,
    batches: list[Batch],
    config: SparsityConfig,
    needs: frozenset[str],
    sparsities: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One pass of `allocator.measure` in model order; with `sparsities`, over the model masked to them."""
    allocator, pruner = _algorithms(config)
    pattern = Pattern.parse(config.pattern)
    if type(allocator).measure is Allocator.measure:
        return [dict.fromkeys(block.weights) for block in layout.blocks if block.weights]
    fisher = fisher_information(model, layout, batches) if FISHER in needs and sparsities is None else {}
    stats = needs & STATS
    measures: dict[int, dict[str, Any]] = {}
    stream = stream_blocks(model, layout, batches if stats else [], stats, rewrites=sparsities is not None)
    for block in _progress(stream, layout, f"Measuring ({allocator.name})"):
        _check_finite(block)
        _fall_back(block, layout, stats)
        for name, layer in block.layers.items():
            layer.fisher = fisher.get(name)
            if SCORES in allocator.needs:
                layer.scores = pruner.scores(layer)
            layer.pattern = pattern
        measures[block.index] = allocator.measure(block.layers, pruner)
        for name, layer in block.layers.items() if sparsities is not None else ():
            layer.sparsity = sparsities[name]  # type: ignore[index]
            layer.pattern = pattern.at(layer.sparsity)
            scores = pruner.scores(layer) if layer.scores is None else layer.scores
            block.mask(name, pruner.mask(layer, scores))
    return [measures[index] for index in sorted(measures)]


def _algorithms(config: SparsityConfig) -> tuple[Allocator, Pruner]:
    assert isinstance(config.allocator, Allocator) and isinstance(config.pruner, Pruner)  # SparsityConfig resolved them
    return config.allocator, config.pruner


# ---- the steps of prune


def _prune_group(
    block: StreamedBlock, group: list[Layer], pruner: Pruner, rows: RowAllocator | None, fallbacks: Mapping[str, str]
) -> dict[str, LayerReport]:
    """Prunes layers that share their inputs, writes them, and says what became of them."""
    start = time.perf_counter()
    for layer in group:
        if rows is not None and layer.sparsity > 0 and layer.name not in fallbacks:
            layer.scores = pruner.scores(layer) if SCORES in rows.needs else None
            layer.rows = rows.rows(layer)
    pruned = pruner.prune_together(group)
    solved = (time.perf_counter() - start) / len(group)
    reports = {}
    for layer, weight in zip(group, pruned, strict=True):
        if not torch.isfinite(weight).all():
            raise RuntimeError(f"{layer.name}: pruning gave NaN or infinite weights; the layer was left as it was")
        zeros, size = int((weight == 0).sum()), weight.numel()
        allowed = LARGEST_DEVIATION + 1 / weight.shape[1]
        if zeros / size < layer.sparsity - allowed:
            raise RuntimeError(
                f"{layer.name}: {zeros / size:.4f} of its weights became zero where the plan wants {layer.sparsity:.4f}"
            )
        note = fallbacks.get(layer.name, "")
        if not note and zeros / size > layer.sparsity + 0.02:
            note = f"sparser than planned ({zeros / size:.3f}, not {layer.sparsity:.3f}): equal weights, or some were zero before"
        error = _output_error(layer, weight)
        tokens = layer.stats.tokens if layer.stats is not None else None
        block.write(layer.name, weight)
        layer.scores = layer.rows = None
        reports[layer.name] = LayerReport(zeros, size, layer.sparsity, error, tokens, round(solved, 6), note)
    return reports


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


def _fall_back(block: StreamedBlock, layout: Layout, needs: frozenset[str]) -> dict[str, str]:
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


def _check_resident_weights(layout: Layout) -> None:
    """Before anything is changed: no NaN or infinity in the weights that are at hand."""
    for name, weight in layout.weights.items():
        parameter = weight.module._parameters[weight.attribute]
        if parameter is not None and parameter.device.type != "meta" and not torch.isfinite(weight.read()).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")


def _check_finite(block: StreamedBlock) -> None:
    for name, layer in block.layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")
        stats = layer.stats
        if stats is not None and stats.tokens and not torch.isfinite(stats.norms).all():
            raise ValueError(
                f"the inputs of {name} are NaN or infinite: the model overflows in {layer.weight.dtype} on this data; load it in bfloat16 or float32"
            )


def _progress(stream: Iterator[StreamedBlock], layout: Layout, title: str) -> Iterator[StreamedBlock]:
    total = sum(bool(block.weights) for block in layout.blocks)
    with tqdm(total=total, desc=title, unit="block", disable=None, leave=False) as bar:
        for block in stream:
            yield block
            bar.update()
