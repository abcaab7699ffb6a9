"""The verb `prune`: carry out a plan."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Pattern, Pruner
from ..checkpoint.output import Output
from ..distributed import share
from ..model.accepted import check_tokenizer
from ..model.fingerprint import versions
from ..model.identity import renew_identity
from ..model.inference import without_autocast
from ..model.precision import computing, lent_precision
from ..plan import LayerReport, Plan, Report
from ..planning.preparation import Prepared
from ..streaming.fallback import check_finite, fall_back
from ..streaming.halving import advising
from ..streaming.run import PassOptions, Progress
from ..streaming.stream import stream_blocks
from .evidence import Evidence
from .half_blocks import DenseOutputs
from .preparation import PruningJob, prepare_pruning
from .prune_block import prune_block
from .reconstruction import BlockReconstruction
from .refinement import Refinement

logger = logging.getLogger(__name__)


@without_autocast()
@advising()
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
    on_start: Callable[[Prepared], None] | None = None,
) -> Report:
    """Carries out a plan, in place; the plan then stands in `model.config.sparsity_config`.

    With `output_dir` every block is on disk as soon as it is pruned. A run that was interrupted goes on at the next
    block when it is started again with the same arguments, on the dense model, and ends with the same bits.
    Where a run of the same arguments has completed the folder, the model gets its weights and nothing is computed.
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
        on_start: called with what was prepared, such as the memory it will take, once all is checked and before the
            first block.

    Raises:
        ValueError: a plan for another model or that misses its target; bad or missing data; too many weights whose
            inputs are not seen (see `SparsityConfig.allow_unseen`); an output folder with other files, or with a run of other arguments; reconstruction in several processes.
        RuntimeError: a layer ended less sparse than planned, or another process of the run stopped.
        OSError: the disk is full; what is finished is safe.
    """
    start = time.perf_counter()
    check_tokenizer(tokenizer)
    job = prepare_pruning(
        model,
        plan,
        batches,
        pruner=pruner,
        output_dir=output_dir,
        overwrite=overwrite,
        hidden_limit=hidden_limit,
        reconstruct=reconstruct,
    )
    if on_start is not None:
        on_start(job.run)
    job.begin()
    if job.output is not None and job.output.is_complete:
        renew_identity(model, job.output.path)
        return job.output.restore(model, job.run.model_layers)
    with computing(model, job.run.compute_dtype):
        evidence = Evidence(job)
        if job.output is not None:
            job.output.resume(model, job.run.model_layers)

        layers = _prune_blocks(job)

        evidence.measure_pruned()
    report = _report(job, layers, evidence, seconds=time.perf_counter() - start)
    model.config.sparsity_config = plan.to_dict() | {"pruned": _record(job, report, evidence)}
    renew_identity(model, job.output.path if job.output else None)
    if job.output is not None:
        report = job.output.finish(model, job.run.model_layers, report, tokenizer)
    for name, note in report.notes.items():
        logger.warning("%s: %s", name, note)
    return report


def _prune_blocks(job: PruningJob) -> dict[str, LayerReport]:
    """The loop: prunes one block after the other on its real inputs, trains it if asked, writes it to the output."""
    run, recovery, output = job.run, job.recovery, job.output
    reports: dict[str, LayerReport] = output.report() if output else {}
    options = PassOptions(run.processes, run.hidden_limit, run.journal)
    stream = stream_blocks(
        run.model,
        run.model_layers,
        share(run.data, run.processes),
        job.needs,
        rewrites=True,
        run=options,
        twins=recovery is not None,
    )
    progress = Progress("Pruning", run.model_layers, options, run.data)
    for block in progress.over(stream):
        check_finite(block)
        reasons = fall_back(block, run.model_layers, job.needs)
        fallbacks = {name: f"{job.pruner.without_inputs}: {reason}" for name, reason in reasons.items()}
        for layer in block.layers.values():
            layer.sparsity = job.plan.layers[layer.name].sparsity
            layer.pattern = Pattern.parse(job.plan.layers[layer.name].pattern)
        inside = run.model_layers.blocks[block.index]
        dense: DenseOutputs | None = None
        if recovery:
            with lent_precision(inside.module):
                dense = recovery.watch(block, inside)
        finish = Refinement(job.refit, job.swaps)
        pruned = prune_block(block, job.pruner, job.rows, fallbacks, run.processes, progress, finish)
        reports |= pruned
        if recovery and dense:
            with lent_precision(inside.module):
                recovery.train(block, dense, progress, run.journal)
        if output is not None:
            output.write_block(run.model, run.model_layers, inside, pruned)
    return reports


def _report(job: PruningJob, layers: Mapping[str, LayerReport], evidence: Evidence, *, seconds: float) -> Report:
    promised = (job.plan.chosen or {}).get("certificate")
    return Report(
        target=job.plan.target,
        layers={name: layers[name] for name in job.run.model_layers.weights},
        skipped=job.run.model_layers.skipped,
        seconds=seconds,
        sources={name: score.to_dict() for name, score in evidence.sources.items()},
        certificate={"masks": promised, "pruned": evidence.certificate} if promised else None,
        revalidation=evidence.revalidation,
        compute_dtype=job.run.compute_name,
    )


def _record(job: PruningJob, report: Report, evidence: Evidence) -> dict[str, Any]:
    """What the model's config keeps of the run, under `sparsity_config["pruned"]`."""
    recovery = job.recovery
    optional = {
        "reconstruction": recovery.summary(job.run.model_layers, job.run.journal) if recovery else None,
        "revalidation": evidence.revalidation,
        "certificate": evidence.certificate,
        "given": job.pruner.to_dict() if job.pruner.takes_zeros else None,
    }
    return {
        "sparsity": report.sparsity,
        "data": job.run.fingerprints["data"],
        "versions": versions(),
        **{key: value for key, value in optional.items() if value},
        **({"arguments": job.output.arguments()} if job.output is not None else {}),
    }
