"""The verb `make_plan`: decide how sparse each layer will be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import FISHER, LOSS, Pattern
from ..allocators.race import Race
from ..calibration.batches import data_fingerprint, prepare_batches
from ..calibration.mixture import Mixture
from ..calibration.splits import hold_out
from ..checkpoint.output import Output, open_output
from ..checkpoint.plan_file import PlanFile
from ..config import SparsityConfig
from ..core.stats import STATS
from ..distributed import Processes
from ..model.classes import require_next_token
from ..model.fingerprint import versions
from ..model.inference import Batch, without_autocast
from ..model.layers import Weight, find_layers
from ..model.precision import computing
from ..plan import LayerPlan, Plan
from ..race_record import RaceDetails
from ..streaming.halving import advising
from .allocate import Choice, allocate
from .checks import check_unseen, check_widths, warn_of_unseen
from .measure import needed
from .preparation import Prepared, prepare
from .race.candidates import allocators
from .race.choose import choose


@without_autocast()
@advising()
def make_plan(
    model: PreTrainedModel,
    config: SparsityConfig | Mapping[str, Any],
    batches: Tensor | Iterable[Mapping[str, Any]] | None = None,
    *,
    output_dir: str | os.PathLike[str] | Output | PlanFile | None = None,
    overwrite: bool = False,
    hidden_limit: int | None = None,
    on_start: Callable[[Prepared], None] | None = None,
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
        on_start: called with what was prepared, such as the memory it will take, once all is checked and before the
            first block.

    Raises:
        ValueError: bad data, an N:M that does not divide a layer's width, missing calibration data; too many weights
            whose inputs are not seen (see `SparsityConfig.allow_unseen`); an output folder with other files, or with a
            run of other arguments.
    """
    config = SparsityConfig.of(config)
    allocator = config.allocator
    model_layers = find_layers(model, config.ignore, config.include)
    if isinstance(allocator, Race) or allocator.needs & {FISHER, LOSS}:
        require_next_token(model, f"allocator {allocator.name!r}")
    check_widths(model_layers, Pattern.parse(config.pattern))
    needs = _needs(config)
    data = _calibration(model, config, batches, needs)
    output = output_dir if isinstance(output_dir, PlanFile) else open_output(output_dir, overwrite, Processes.current())
    run = prepare(
        model,
        model_layers,
        data,
        needs=needs | config.pruning_needs if isinstance(output, Output) else needs,  # pruning into the folder follows
        output=output,
        hidden_limit=hidden_limit,
        computes=config.compute_dtype,
    )
    looks_at_data = (needs | config.pruning_needs) & STATS
    if isinstance(output, Output) and output.goes_on:  # the plan is known, and all was seen when it was made
        looks_at_data = frozenset()
    with computing(model, run.compute_dtype):
        unseen = check_unseen(model, model_layers, data if looks_at_data else [], config.allow_unseen)
    if on_start is not None:
        on_start(run)
    run.begin("plan", {"config": config.to_dict()})
    if output is not None and output.is_complete:
        return dataclasses.replace(Plan.load(output.path), algorithms=_instances(config))
    if (finished := _finished_plan(run, config)) is not None:
        return finished

    with computing(model, run.compute_dtype):
        if isinstance(allocator, Race):
            choice = choose(run, config, allocator, batches.sources if isinstance(batches, Mixture) else ())
        else:
            choice = allocate(run, config, allocator)
    choice = dataclasses.replace(choice, unseen={**unseen, **choice.unseen})
    warn_of_unseen(choice.unseen)

    plan = _plan_of(run, config, choice, has_data=bool(needs))
    plan.check_target()
    run.processes.agree("the plan they made", {name: layer.sparsity for name, layer in plan.layers.items()})
    if run.journal is not None:
        if plan.story is not None:
            run.journal.remember("story", "", plan.story.to_dict())
        run.journal.remember("plan", "", plan.to_dict())
    return plan


def _needs(config: SparsityConfig) -> frozenset[str]:
    """The facts that planning uses; for a race, all that its candidates and the pruner use."""
    if isinstance(config.allocator, Race):
        competing = allocators(config.allocator.candidates).values()
        return config.allocator.needs | config.pruner.needs.union(*(allocator.needs for allocator in competing))
    return needed(config.allocator, config.pruner)


def _calibration(model: PreTrainedModel, config: SparsityConfig, batches: Any, needs: frozenset[str]) -> list[Batch]:
    """The prepared batches to plan with; `ValueError` when there are none and `needs` asks for some."""
    data = prepare_batches(model, batches) if batches is not None else []
    if not isinstance(config.allocator, Race):  # a race splits the data itself
        data, _ = hold_out(batches, data)
    wanting = needs & (STATS | {FISHER, LOSS})
    if wanting and not data:
        raise ValueError(
            f"allocator {config.allocator.name!r} measures {' and '.join(sorted(wanting))} and needs calibration data: pass batches"
        )
    return data


def _finished_plan(run: Prepared, config: SparsityConfig) -> Plan | None:
    """The plan that an earlier, interrupted run with this output had finished."""
    if run.journal is None or (recorded := run.journal.recall("plan")) is None:
        return None
    story = run.journal.recall("story")
    return dataclasses.replace(
        Plan.from_dict(recorded),
        algorithms=_instances(config),
        story=RaceDetails.from_dict(story) if story else None,
    )


def _plan_of(run: Prepared, config: SparsityConfig, choice: Choice, *, has_data: bool) -> Plan:
    pattern = Pattern.parse(config.pattern)
    return Plan(
        config=config.to_dict(),
        layers={
            name: _layer_plan(weight, choice.sparsities[name], pattern, choice.numbers.get(name))
            for name, weight in run.model_layers.weights.items()
        },
        model=run.fingerprints["model"],
        data=data_fingerprint(choice.data) if has_data else None,
        versions=versions(),
        chosen=choice.record,
        algorithms=_instances(config),
        story=choice.story,
        unseen=choice.unseen,
        compute_dtype=run.compute_name if has_data else None,
    )


def _layer_plan(weight: Weight, sparsity: float, pattern: Pattern, measure: float | None) -> LayerPlan:
    """Experts, of which there may be thousands, are rounded as the JSON writes them, so that nothing is lost there."""
    if weight.expert is not None:
        sparsity = round(sparsity, 9)
        measure = None if measure is None else float(f"{measure:.4g}")
    return LayerPlan(sparsity, weight.size, str(pattern.at(sparsity)), measure)


def _instances(config: SparsityConfig) -> dict[str, Any]:
    """Returns the algorithms themselves, for a `prune` in the same process."""
    return {"allocator": config.allocator, "pruner": config.pruner, "row_allocator": config.row_allocator}
