"""The two verbs: `make_plan` decides, `prune` does. Each is one loop over `stream_blocks`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import (
    FISHER,
    LOSS,
    REMEASURE,
    SCORES,
    Pattern,
    Probe,
    Pruner,
    RowAllocator,
)
from ..allocators.race import Race
from ..config import SparsityConfig
from ..core.stats import NORMS, STATS
from ..plan import LayerPlan, LayerReport, Plan, Report
from ..story import Story
from .batches import fingerprint, prepare_batches
from .by_source import SourceWitness, keep_apart
from .certificate import Witness
from .choose import Choice, choose, split_of
from .drive import Batch
from .entrants import allocators, meet
from .estimate import check_room
from .fit import check_plan, check_widths, model_fingerprint, plan_config, versions
from .journal import Journal, digest
from .layers import Layout, Weight, find_layout
from .measure import Measuring, algorithms, check_finite, fall_back, share
from .mixture import Mixture
from .output import Output
from .pack import check_worth
from .plan_file import PlanFile
from .probe import Candidates, MaskedLoss
from .processes import Processes
from .reconstruct import STREAMS, BlockReconstruction, Reconstruction
from .revalidate import has_travelled, revalidate
from .run import Run, progress
from .solve import prune_block
from .source import source_weights
from .stream import stream_blocks

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
    allocator, pruner = algorithms(config)
    layout = find_layout(model, config.ignore)
    pattern = Pattern.parse(config.pattern)
    check_widths(layout, pattern)
    needs = allocator.needs | (pruner.needs if allocator.needs & {SCORES, LOSS} else frozenset())
    if isinstance(allocator, Race):
        needs = needs.union(*(one.needs for one in allocators(allocator.candidates).values()))
    data = prepare_batches(model, batches) if batches is not None else []
    if not isinstance(allocator, Race):  # which keeps some apart itself
        data, _ = keep_apart(batches, data)
    wanting = needs & (STATS | {FISHER, LOSS})
    if wanting and not data:
        raise ValueError(
            f"allocator {allocator.name!r} measures {' and '.join(sorted(wanting))} and needs calibration data: pass batches"
        )

    processes = Processes.current()
    output = output_dir if isinstance(output_dir, PlanFile) else _output(output_dir, overwrite, processes)
    rows = config.row_allocator.needs if isinstance(config.row_allocator, RowAllocator) else frozenset()
    whole, place = needs, None
    if isinstance(output, Output):  # pruning follows
        whole, place = needs | pruner.needs | rows, output.path
    check_room(model, layout, share(data, processes), whole & STATS, hidden_limit=hidden_limit, output=place)
    facts: dict[str, Any] = {"model": model_fingerprint(model, layout), "data": fingerprint(data) if data else None}
    processes.agree("model and data", facts)
    if output is not None:
        output.begin("plan", {"config": config.to_dict(), "versions": versions(), **facts})
        if (known := output.journal.recall("plan")) is not None:
            story = output.journal.recall("story")
            return dataclasses.replace(
                Plan.from_dict(known), algorithms=_instances(config), story=Story.from_dict(story) if story else None
            )

    journal = output.journal if output else None
    if isinstance(allocator, Race):
        sources = batches.sources if isinstance(batches, Mixture) else ()
        choice = choose(
            model, layout, data, config, processes, journal=journal, hidden_limit=hidden_limit, sources=sources
        )
    else:
        choice = _allocate(model, layout, data, config, needs, Run(processes, hidden_limit), journal)
    plan = Plan(
        config=config.to_dict(),
        layers={
            name: _layer_plan(weight, choice.sparsities[name], pattern, choice.numbers.get(name))
            for name, weight in layout.weights.items()
        },
        model=facts["model"],
        data=fingerprint(choice.data) if needs else None,
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


def prune(
    model: PreTrainedModel,
    plan: Plan,
    batches: Tensor | Iterable[Mapping[str, Any]] | None = None,
    *,
    pruner: Pruner | None = None,
    output_dir: str | os.PathLike[str] | Output | None = None,
    overwrite: bool = False,
    hidden_limit: int | None = None,
    tokenizer: Any = None,
    reconstruct: BlockReconstruction | None = None,
) -> Report:
    """Carries out a plan, in place; the plan then stands in `model.config.sparsity_config`.

    With `output_dir` every block is on disk as soon as it is pruned. A run that was interrupted goes on at the next
    block when it is started again with the same arguments, on the dense model, and ends with the same bits.
    Processes of one launch (`accelerate launch`) that call this together share the work.

    Args:
        model: the model the plan was made for, or one of the same shapes.
        plan: made by `make_plan`, loaded, or edited. One that was made on other weights (a fine-tuned sibling's, say)
            is compared with uniform first, see `revalidate`; what came of it is logged and recorded.
        batches: calibration data, see `prepare_batches`; may be None for pruners that look at weights only. Of a
            `Mixture`, an eighth of each source is not pruned with: on it the report compares with the dense model.
        pruner: the instance, for a loaded plan that names a pruner from outside this package.
        output_dir: the folder to write the sparse model to; needed for a model from `open_streamed`, which
            afterwards reads its weights from there. `Output(folder, layout="bitmask")`: packed; that takes the files
            from under a streamed model, which cannot be used any more then.
        overwrite: start anew if the folder holds an unfinished run or a sparse model.
        hidden_limit: bytes of hidden states of the calibration batches to keep in memory; what exceeds them waits
            on disk. None: no limit.
        tokenizer: saved along with the model.
        reconstruct: train what is left of each half-block, zeros held, until it does again what the dense one did. The
            model has to be dense, and one process does it all. The batches' hidden states are held about seven times,
            which `hidden_limit` is for, too.

    Raises:
        ValueError: a plan for another model or that misses its target; bad or missing data; an output folder with
            other files, or with a run of other arguments; reconstruction in several processes.
        RuntimeError: a layer ended less sparse than planned, or another process of the run stopped.
        OSError: the disk is full; what is finished is safe.
    """
    start = time.perf_counter()
    config = plan_config(plan, pruner)
    _, pruner = algorithms(config)
    rows = config.row_allocator
    assert rows is None or isinstance(rows, RowAllocator)
    layout = find_layout(model, config.ignore)
    check_plan(plan, model, layout)
    needs = (pruner.needs | (rows.needs if rows else frozenset())) & STATS
    if needs and batches is None:
        raise ValueError(
            f"pruner {pruner.name!r}{f' with {rows.name!r}' if rows else ''} needs calibration data: pass batches"
        )
    recovery = Reconstruction.of(reconstruct, config.seed)
    if recovery and batches is None:
        raise ValueError("reconstruction needs calibration data: pass batches")
    if output_dir is None and source_weights(model) is not None:
        raise ValueError("a streamed model is pruned into a folder: pass output_dir")
    facts: dict[str, Any] = {"model": model_fingerprint(model, layout)}
    travelled = has_travelled(plan, facts["model"])
    useful = needs or recovery or plan.chosen
    looked_at = useful or travelled or isinstance(batches, Mixture)
    given = prepare_batches(model, batches) if looked_at and batches is not None else []
    data, kept = split_of(plan.chosen, given)
    data, apart = keep_apart(batches, data, kept)
    data = data if useful else []
    if recovery:
        recovery.check(len(data))
    _check_resident_weights(layout)
    processes = Processes.current()
    output = _output(output_dir, overwrite, processes)
    place = output.path if output else None
    if recovery:
        check_room(model, layout, data * STREAMS, needs | {NORMS}, hidden_limit=hidden_limit, output=place)
    else:
        check_room(model, layout, share(data, processes), needs, hidden_limit=hidden_limit, output=place)
    facts["data"] = fingerprint(data) if data else None
    processes.agree("model, data and plan", {**facts, "plan": plan.to_dict()["layers"]})
    if output is not None:
        if output.layout == "bitmask":
            check_worth(plan, model.dtype)
        done = {
            "layout": output.layout,
            "plan": digest(plan.to_dict()),
            "pruner": pruner.to_dict(),
            "versions": versions(),
            **facts,
        }
        output.begin("prune", done | {"reconstruct": recovery.options.to_dict() if recovery else None})
    validated = _revalidate(model, layout, plan, pruner, given, output, processes) if travelled else None
    witness = Witness(model, layout, kept) if kept else None
    by_source = SourceWitness(model, layout, apart) if apart else None
    if output is not None:
        output.resume(model, layout)

    reports: dict[str, LayerReport] = output.report() if output else {}
    run = Run(processes, hidden_limit, output.journal if output else None)
    twins = recovery is not None
    stream = stream_blocks(model, layout, share(data, processes), needs, rewrites=True, run=run, twins=twins)
    for block in progress(stream, layout, "Pruning", run, data):
        check_finite(block)
        fallbacks = fall_back(block, layout, needs)
        for layer in block.layers.values():
            layer.sparsity = plan.layers[layer.name].sparsity
            layer.pattern = Pattern.parse(plan.layers[layer.name].pattern)
        dense = recovery.watch(block, layout.blocks[block.index]) if recovery else None
        made = prune_block(block, pruner, rows, fallbacks, processes)
        reports |= made
        if recovery and dense:
            recovery.train(block, dense, run.journal)
        if output is not None:
            output.write_block(model, layout, layout.blocks[block.index], made)
    scored = witness.report() if witness else None
    promised = (plan.chosen or {}).get("certificate")
    report = Report(
        target=plan.target,
        layers={name: reports[name] for name in layout.weights},
        skipped=layout.skipped,
        seconds=time.perf_counter() - start,
        sources=by_source.report() if by_source else {},
        certificate={"masks": promised, "pruned": scored} if promised else None,
        revalidation=validated,
    )
    pruned = {"sparsity": report.sparsity, "data": fingerprint(data) if data else None, "versions": versions()}
    if recovery:
        pruned["reconstruction"] = recovery.summary(layout, run.journal)
    if validated:
        pruned["revalidation"] = validated
    if scored:
        pruned["certificate"] = scored
    model.config.sparsity_config = plan.to_dict() | {"pruned": pruned}
    if output is not None:
        output.finish(model, layout, report, tokenizer)
    for name, note in report.notes.items():
        logger.warning("%s: %s", name, note)
    return report


def _output(given: str | os.PathLike[str] | Output | None, overwrite: bool, processes: Processes) -> Output | None:
    if given is None or isinstance(given, Output):
        return given
    return Output(given, overwrite=overwrite, processes=processes)


def _revalidate(
    model: PreTrainedModel,
    layout: Layout,
    plan: Plan,
    pruner: Pruner,
    data: list[Batch],
    output: Output | None,
    processes: Processes,
) -> dict[str, Any] | None:
    """Each process does it alone; the main one's counts. Known from before an interruption, if it was."""
    known: dict[str, Any] | None = output.journal.recall("revalidation") if output else None
    if known is None:
        folder = output.journal.folder if output else None
        known = processes.gather(revalidate(model, layout, plan, pruner, data, folder))[0]
        if output and known:
            output.journal.remember("revalidation", "", known)
    return known


# ---- the steps of make_plan


def _allocate(
    model: PreTrainedModel,
    layout: Layout,
    data: list[Batch],
    config: SparsityConfig,
    needs: frozenset[str],
    run: Run,
    journal: Journal | None,
) -> Choice:
    """Measures on the dense model, and what the allocator assigns, at the exact target."""
    allocator, pruner = algorithms(config)
    pattern, target = Pattern.parse(config.pattern), float(config.sparsity)  # type: ignore[arg-type]
    sizes = {name: weight.size for name, weight in layout.weights.items()}
    fitness = data
    if LOSS in needs and len(data) > 1:  # candidates are judged on sequences that their scores never saw
        held = max(1, len(data) // 8)
        data, fitness = data[:-held], data[-held:]
    measuring = Measuring(model, layout, data, config, needs, run, journal)
    measures = measuring.first()
    probe = None
    if needs & {LOSS, REMEASURE}:
        steps: int = pattern.group or vars(allocator).get("steps", 16)
        candidates = None
        if LOSS in needs:
            loss = MaskedLoss(model, layout, measuring.batches, fitness, pruner, steps, pattern, run)
            candidates = Candidates(loss, run.processes, journal)
        probe = Probe(config.seed, candidates.one if candidates else None, measuring.again, candidates)
    assigned = allocator.assign(measures, sizes, target, group=pattern.group, probe=probe)
    if set(assigned) != set(sizes):
        raise ValueError(f"allocator {allocator.name!r} returned other layers than it was given")
    numbers = {name: allocator.number(value) for block in measures for name, value in block.items()}
    return Choice(meet(assigned, sizes, target, pattern, mixes=allocator.mixes), numbers, None, data)


def _layer_plan(weight: Weight, sparsity: float, pattern: Pattern, measure: float | None) -> LayerPlan:
    """Experts, of which there may be thousands, are rounded as the JSON writes them, so that nothing is lost there."""
    if weight.expert is not None:
        sparsity = round(sparsity, 9)
        measure = None if measure is None else float(f"{measure:.4g}")
    return LayerPlan(sparsity, weight.size, str(pattern.at(sparsity)), measure)


def _instances(config: SparsityConfig) -> dict[str, Any]:
    """The algorithms themselves, for whoever carries out the plan in the same process."""
    return {"allocator": config.allocator, "pruner": config.pruner, "row_allocator": config.row_allocator}


def _check_resident_weights(layout: Layout) -> None:
    """Before anything is changed: no NaN or infinity in the weights that are at hand."""
    for name, weight in layout.weights.items():
        if weight.stored.device.type != "meta" and not torch.isfinite(weight.read()).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")
