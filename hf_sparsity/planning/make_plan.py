"""The two verbs: `make_plan` decides, `prune` does. Each is one loop over `stream_blocks`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import FISHER, LOSS, REMEASURE, Allocator, ModelOracle, Pattern
from ..allocators.race import Race
from ..calibration.batches import data_fingerprint, prepare_batches
from ..calibration.mixture import Mixture
from ..calibration.splits import hold_out
from ..checkpoint.journal import Journal
from ..checkpoint.output import Output, open_output
from ..checkpoint.plan_file import PlanFile
from ..config import SparsityConfig
from ..core.stats import STATS
from ..distributed import Processes, share
from ..model.fingerprint import model_fingerprint, versions
from ..model.inference import Batch
from ..model.layers import ModelLayers, Weight, find_layers
from ..plan import LayerPlan, Plan
from ..race_record import RaceDetails
from ..streaming.memory import check_room
from ..streaming.run import PassOptions
from .budget import meet
from .checks import check_widths
from .masked_loss import Candidates, MaskedLoss
from .measure import Measuring, needed
from .race.candidates import allocators
from .race.choose import Choice, choose

logger = logging.getLogger(__name__)


def make_plan(
    model: PreTrainedModel,
    config: SparsityConfig | Mapping[str, Any],
    batches: Tensor | Iterable[Mapping[str, Any]] | None = None,
    *,
    output_dir: str | os.PathLike[str] | Output | PlanFile | None = None,
    overwrite: bool = False,
    hidden_limit: int | None = None,
) -> Plan:
    """Decides the sparsity of each layer; the model is unchanged.

    Processes of one launch (`accelerate launch`) that call this together share the work and get the same plan.

    Args:
        model: a transformers model, in memory, dispatched by accelerate, or from `open_streamed`.
        config: what is wanted.
        batches: calibration data, see `prepare_batches`; may be None for allocators that look at weights only. Of a
            `Mixture`, an eighth of each source is left to judge the pruned model by.
        output_dir: where the model will go, or `PlanFile(file)`, where the plan will; keeps a record there, so that an
            interrupted planning goes on when it is called again with the same arguments.
        overwrite: start anew if the folder holds an unfinished run or a sparse model.
        hidden_limit: bytes of hidden states of the calibration batches to keep in memory; what exceeds them waits
            on disk. None: no limit.

    Raises:
        ValueError: bad data, an N:M that does not divide a layer's width, missing calibration data; an output
            folder with other files, or with a run of other arguments.
    """
    config = SparsityConfig.from_dict(config) if isinstance(config, Mapping) else config
    allocator, pruner = config.allocator, config.pruner
    model_layers = find_layers(model, config.ignore)
    pattern = Pattern.parse(config.pattern)
    check_widths(model_layers, pattern)
    if isinstance(allocator, Race):
        needs = allocator.needs | pruner.needs.union(*(one.needs for one in allocators(allocator.candidates).values()))
    else:
        needs = needed(allocator, pruner)
    data = prepare_batches(model, batches) if batches is not None else []
    if not isinstance(allocator, Race):  # which keeps some apart itself
        data, _ = hold_out(batches, data)
    wanting = needs & (STATS | {FISHER, LOSS})
    if wanting and not data:
        raise ValueError(
            f"allocator {allocator.name!r} measures {' and '.join(sorted(wanting))} and needs calibration data: pass batches"
        )

    processes = Processes.current()
    output = output_dir if isinstance(output_dir, PlanFile) else open_output(output_dir, overwrite, processes)
    rows = config.row_allocator.needs if config.row_allocator else frozenset()
    whole, place = needs, None
    if isinstance(output, Output):  # pruning follows
        whole, place = needs | pruner.needs | rows, output.path
    check_room(model, model_layers, share(data, processes), whole & STATS, hidden_limit=hidden_limit, output=place)
    facts: dict[str, Any] = {
        "model": model_fingerprint(model, model_layers),
        "data": data_fingerprint(data) if data else None,
    }
    processes.agree("model and data", facts)
    if output is not None:
        output.begin("plan", {"config": config.to_dict(), "versions": versions(), **facts})
        if (known := output.journal.recall("plan")) is not None:
            story = output.journal.recall("story")
            return dataclasses.replace(
                Plan.from_dict(known),
                algorithms=_instances(config),
                story=RaceDetails.from_dict(story) if story else None,
            )

    journal = output.journal if output else None
    if isinstance(allocator, Race):
        sources = batches.sources if isinstance(batches, Mixture) else ()
        choice = choose(
            model, model_layers, data, config, processes, journal=journal, hidden_limit=hidden_limit, sources=sources
        )
    else:
        run = PassOptions(processes, hidden_limit)
        choice = _allocate(model, model_layers, data, config, allocator, run, journal)
    plan = Plan(
        config=config.to_dict(),
        layers={
            name: _layer_plan(weight, choice.sparsities[name], pattern, choice.numbers.get(name))
            for name, weight in model_layers.weights.items()
        },
        model=facts["model"],
        data=data_fingerprint(choice.data) if needs else None,
        versions=versions(),
        chosen=choice.record,
        algorithms=_instances(config),
        story=choice.story,
    )
    plan.check_target()
    processes.agree("the plan they made", {name: layer.sparsity for name, layer in plan.layers.items()})
    if output is not None:
        if plan.story is not None:
            output.journal.remember("story", "", plan.story.to_dict())
        output.journal.remember("plan", "", plan.to_dict())
    return plan


# ---- the steps of make_plan


def _allocate(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    data: list[Batch],
    config: SparsityConfig,
    allocator: Allocator,
    run: PassOptions,
    journal: Journal | None,
) -> Choice:
    """Measures on the dense model, and what the allocator assigns, at the exact target."""
    pruner, pattern, target = config.pruner, Pattern.parse(config.pattern), config.sparsity
    needs = needed(allocator, pruner)
    sizes = {name: weight.size for name, weight in model_layers.weights.items()}
    fitness = data
    if LOSS in needs and len(data) > 1:  # candidates are judged on sequences that their scores never saw
        held = max(1, len(data) // 8)
        data, fitness = data[:-held], data[-held:]
    measuring = Measuring(model, model_layers, data, allocator, pruner, pattern, run, journal)
    measures = measuring.first()
    probe = None
    if needs & {LOSS, REMEASURE}:
        steps: int = pattern.group or allocator.grid_steps
        candidates = None
        if LOSS in needs:
            loss = MaskedLoss(model, model_layers, measuring.batches, fitness, pruner, steps, pattern, run)
            candidates = Candidates(loss, run.processes, journal)
        probe = ModelOracle(config.seed, candidates.one if candidates else None, measuring.again, candidates)
    assigned = allocator.assign(measures, sizes, target, group=pattern.group, probe=probe)
    if set(assigned) != set(sizes):
        raise ValueError(f"allocator {allocator.name!r} returned other layers than it was given")
    numbers = {name: allocator.number(value) for block in measures for name, value in block.items()}
    return Choice(
        meet(assigned, sizes, target, pattern, group_multiples=allocator.returns_group_multiples), numbers, None, data
    )


def _layer_plan(weight: Weight, sparsity: float, pattern: Pattern, measure: float | None) -> LayerPlan:
    """Experts, of which there may be thousands, are rounded as the JSON writes them, so that nothing is lost there."""
    if weight.expert is not None:
        sparsity = round(sparsity, 9)
        measure = None if measure is None else float(f"{measure:.4g}")
    return LayerPlan(sparsity, weight.size, str(pattern.at(sparsity)), measure)


def _instances(config: SparsityConfig) -> dict[str, Any]:
    """The algorithms themselves, for whoever carries out the plan in the same process."""
    return {"allocator": config.allocator, "pruner": config.pruner, "row_allocator": config.row_allocator}
