"""One allocator's way to the sparsity of each layer: measure on the dense model, assign, meet the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..algorithm import LOSS, REMEASURE, Allocator, ModelOracle, Pattern
from ..config import SparsityConfig
from ..model.inference import Batch
from ..race_record import RaceDetails
from ..streaming.run import PassOptions
from .budget import meet
from .masked_loss import Candidates, MaskedLoss
from .measure import Measuring
from .preparation import Prepared

HELD_OUT_SHARE = 8  # one of 8 sequences judges candidates and is not measured on


@dataclass(frozen=True)
class Choice:
    """What was decided, and how.

    Args:
        sparsities: of each layer.
        numbers: what the allocator measured of each layer, one number each, or None.
        record: what a race saw, for the plan's JSON.
        data: the calibration batches that the decision saw.
        story: what a race saw beyond its record.
        unseen: layers that were measured by magnitude only -> the reason.
    """

    sparsities: Mapping[str, float]
    numbers: Mapping[str, float | None]
    record: dict[str, Any] | None
    data: list[Batch]
    story: RaceDetails | None = None
    unseen: Mapping[str, str] = field(default_factory=dict)


def allocate(run: Prepared, config: SparsityConfig, allocator: Allocator) -> Choice:
    """Measures on the dense model and lets the allocator assign sparsities, which then meet the target exactly."""
    pattern, data, judging = Pattern.parse(config.pattern), run.data, run.data
    sizes = {name: weight.size for name, weight in run.model_layers.weights.items()}
    if LOSS in allocator.needs and len(data) > 1:  # candidates are judged on sequences that their scores never saw
        held = max(1, len(data) // HELD_OUT_SHARE)
        data, judging = data[:-held], data[-held:]
    options = PassOptions(run.processes, run.hidden_limit)
    measuring = Measuring(run.model, run.model_layers, data, allocator, config.pruner, pattern, options, run.journal)
    measures = measuring.first()
    oracle = _oracle(run, config, measuring, judging) if allocator.needs & {LOSS, REMEASURE} else None
    assigned = assign(allocator, measures, sizes, config.sparsity, pattern=pattern, oracle=oracle)
    return Choice(assigned, numbers(allocator, measures), None, data, unseen=measuring.notes)


def assign(
    allocator: Allocator,
    measures: list[dict[str, Any]],
    sizes: Mapping[str, int],
    target: float,
    *,
    pattern: Pattern,
    oracle: ModelOracle | None,
) -> dict[str, float]:
    """Returns what the allocator assigns, moved to the exact target; `ValueError` if it names other layers."""
    assigned = allocator.assign(measures, sizes, target, group=pattern.group, probe=oracle)
    if set(assigned) != set(sizes):
        raise ValueError(f"allocator {allocator.name!r} returned other layers than it was given")
    return meet(assigned, sizes, target, pattern, group_multiples=allocator.returns_group_multiples)


def numbers(allocator: Allocator, measures: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns the one number of each layer's measure that plans record."""
    return {name: allocator.number(value) for block in measures for name, value in block.items()}


def _oracle(run: Prepared, config: SparsityConfig, measuring: Measuring, judging: list[Batch]) -> ModelOracle:
    """What the allocator may ask of the model; the loss is computed on the batches in `judging`."""
    allocator, pattern = measuring.allocator, measuring.pattern
    if LOSS not in allocator.needs:
        return ModelOracle(config.seed, remeasure=measuring.again)
    steps = pattern.group or allocator.grid_steps
    loss = MaskedLoss(
        run.model, run.model_layers, measuring.batches, judging, config.pruner, steps, pattern, measuring.run
    )
    candidates = Candidates(loss, run.processes, run.journal)
    return ModelOracle(config.seed, candidates.one, measuring.again, candidates)
