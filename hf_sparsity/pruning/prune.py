"""The verb `prune`: carry out a plan."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Pattern, Pruner
from ..calibration.batches import data_fingerprint, prepare_batches
from ..calibration.mixture import Mixture
from ..calibration.splits import hold_out, split_of
from ..checkpoint.journal import digest
from ..checkpoint.output import Output, open_output
from ..checkpoint.packed_folder import check_worth
from ..core.stats import NORMS, STATS
from ..distributed import Processes, share
from ..evaluation.by_source import SourceScores
from ..evaluation.certificate import CertificateScore
from ..model.fingerprint import model_fingerprint, versions
from ..model.inference import Batch
from ..model.layers import ModelLayers, find_layers
from ..model.offload import weight_store
from ..plan import LayerReport, Plan, Report
from ..planning.checks import check_plan, plan_config
from ..planning.transfer import made_on_other_weights, revalidate
from ..streaming.fallback import check_finite, fall_back
from ..streaming.memory import check_room
from ..streaming.run import PassOptions, Progress
from ..streaming.stream import stream_blocks
from .prune_block import prune_block
from .reconstruction import STREAMS, BlockReconstruction, Reconstruction

logger = logging.getLogger(__name__)


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
    pruner, rows = config.pruner, config.row_allocator
    model_layers = find_layers(model, config.ignore)
    check_plan(plan, model, model_layers)
    needs = (pruner.needs | (rows.needs if rows else frozenset())) & STATS
    if needs and batches is None:
        raise ValueError(
            f"pruner {pruner.name!r}{f' with {rows.name!r}' if rows else ''} needs calibration data: pass batches"
        )
    recovery = Reconstruction.of(reconstruct, config.seed)
    if recovery and batches is None:
        raise ValueError("reconstruction needs calibration data: pass batches")
    if output_dir is None and weight_store(model) is not None:
        raise ValueError("a streamed model is pruned into a folder: pass output_dir")
    facts: dict[str, Any] = {"model": model_fingerprint(model, model_layers)}
    travelled = made_on_other_weights(plan, facts["model"])
    useful = needs or recovery or plan.chosen
    looked_at = useful or travelled or isinstance(batches, Mixture)
    given = prepare_batches(model, batches) if looked_at and batches is not None else []
    data, kept = split_of(plan.chosen, given)
    data, apart = hold_out(batches, data, kept)
    data = data if useful else []
    if recovery:
        recovery.check(len(data))
    _check_resident_weights(model_layers)
    processes = Processes.current()
    output = open_output(output_dir, overwrite, processes)
    place = output.path if output else None
    if recovery:
        check_room(model, model_layers, data * STREAMS, needs | {NORMS}, hidden_limit=hidden_limit, output=place)
    else:
        check_room(model, model_layers, share(data, processes), needs, hidden_limit=hidden_limit, output=place)
    facts["data"] = data_fingerprint(data) if data else None
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
    validated = _revalidate(model, model_layers, plan, pruner, given, output, processes) if travelled else None
    witness = CertificateScore(model, model_layers, kept) if kept else None
    by_source = SourceScores(model, model_layers, apart) if apart else None
    if output is not None:
        output.resume(model, model_layers)

    reports: dict[str, LayerReport] = output.report() if output else {}
    run = PassOptions(processes, hidden_limit, output.journal if output else None)
    twins = recovery is not None
    stream = stream_blocks(model, model_layers, share(data, processes), needs, rewrites=True, run=run, twins=twins)
    progress = Progress("Pruning", model_layers, run, data)
    for block in progress.over(stream):
        check_finite(block)
        fallbacks = fall_back(block, model_layers, needs)
        for layer in block.layers.values():
            layer.sparsity = plan.layers[layer.name].sparsity
            layer.pattern = Pattern.parse(plan.layers[layer.name].pattern)
        dense = recovery.watch(block, model_layers.blocks[block.index]) if recovery else None
        made = prune_block(block, pruner, rows, fallbacks, processes, progress)
        reports |= made
        if recovery and dense:
            recovery.train(block, dense, progress, run.journal)
        if output is not None:
            output.write_block(model, model_layers, model_layers.blocks[block.index], made)
    scored = witness.report() if witness else None
    promised = (plan.chosen or {}).get("certificate")
    report = Report(
        target=plan.target,
        layers={name: reports[name] for name in model_layers.weights},
        skipped=model_layers.skipped,
        seconds=time.perf_counter() - start,
        sources=by_source.report() if by_source else {},
        certificate={"masks": promised, "pruned": scored} if promised else None,
        revalidation=validated,
    )
    pruned = {"sparsity": report.sparsity, "data": data_fingerprint(data) if data else None, "versions": versions()}
    if recovery:
        pruned["reconstruction"] = recovery.summary(model_layers, run.journal)
    if validated:
        pruned["revalidation"] = validated
    if scored:
        pruned["certificate"] = scored
    model.config.sparsity_config = plan.to_dict() | {"pruned": pruned}
    if output is not None:
        output.finish(model, model_layers, report, tokenizer)
    for name, note in report.notes.items():
        logger.warning("%s: %s", name, note)
    return report


def _revalidate(
    model: PreTrainedModel,
    model_layers: ModelLayers,
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
        known = processes.gather(revalidate(model, model_layers, plan, pruner, data, folder))[0]
        if output and known:
            output.journal.remember("revalidation", "", known)
    return known


def _check_resident_weights(model_layers: ModelLayers) -> None:
    """Before anything is changed: no NaN or infinity in the weights that are at hand."""
    for name, weight in model_layers.weights.items():
        if weight.stored.device.type != "meta" and not torch.isfinite(weight.read()).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")
