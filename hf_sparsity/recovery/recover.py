"""`recover`: one call from a sparse model to a better one with the same zeros, in a folder that says what was done.

While it runs, the folder has `UNFINISHED/` with a journal and the Trainer's checkpoints; `config.json` comes last. A run
that was interrupted goes on when it is called again with the same arguments, and ends with the same bits.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..checkpoint.journal import Journal
from ..checkpoint.output import Output
from ..checkpoint.zeros import REPORT_FILE, check_written
from ..evaluation.perplexity import evaluate_text
from ..files import MARKER
from ..model.accepted import check_tokenizer
from ..model.fingerprint import weights_fingerprint
from ..model.identity import renew_identity
from ..model.loading import load_sparse
from ..model.offload import weight_store
from ..model.sparsity import check_zeros, measure_sparsity, model_plan, planned_layers
from ..plan import Plan, Report
from ..planning.make_plan import make_plan
from ..pruning.prune import prune
from ..pruning.reconstruction import BlockReconstruction
from .methods import Reconstruction, RecoveryMethod, TrainToSparsity, as_method
from .preparation import Preparation, prepare
from .training import retrain

logger = logging.getLogger(__name__)

PLANNING = 128  # training sequences that a plan is made on, at most


def recover(
    model: PreTrainedModel | str | os.PathLike[str],
    data: Any,
    method: str | RecoveryMethod | BlockReconstruction = "lora",
    *,
    output_dir: str | os.PathLike[str],
    teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    auto_class: Any = None,
    length: int | None = None,
    seed: int = 0,
    column: str | None = None,
    split: str = "train",
    overwrite: bool = False,
    layout: str = "dense",
    **options: Any,
) -> Any:
    """Trains what pruning left of a causal language model, keeps every zero, and writes the result to a folder.

        recover("pruned", "corpus.jsonl", output_dir="recovered", teacher="dense")
        recover("pruned", "corpus.jsonl", FullFineTuning(steps=500, lr=1e-4), output_dir="recovered")

    One sequence in 16 of the data is held out to measure the loss before and after; `sparsity_config["recovered"]` in
    the folder's `config.json` has both, with the method, its options, the data's fingerprint and the versions.

    Args:
        model: a sparse model or its folder; for `TrainToSparsity` and `TrainByElsa` a dense one. All but `Reconstruction`
            change a model in memory in place.
        data: as for `calibration_batches`: texts, a dataset, a file, or token ids `[n, t]`; a list of `Source` for a mix,
            in which `"self"` are samples of the teacher, or of the sparse model without one.
        method: `MaskedLora(...)`, `FullFineTuning(...)`, `Reconstruction(...)`, `Distillation(...)`, `TrainToSparsity(...)` or
            `TrainByElsa(...)` with their options, or a recipe, such as `recipe(80)`; or one of their names "lora", "full",
            "reconstruct", "distill", "gradual" and "elsa", with options as further keywords of this function.
        output_dir: a new or empty folder, or one with an interrupted run of the same arguments, which goes on.
        teacher: the dense model or its folder: needed for "reconstruct" and "distill"; the others distil from it if it is
            given, see `DistillationTrainer`.
        tokenizer: saved with the model; by default the folder's own.
        auto_class: the class to open folders with, or its name; by default the one that each `config.json` names.
        length: tokens of a sequence; by default 2048 or the model's limit.
        seed: decides the order of the data and the first values of adapters.
        column, split: of a dataset, which column has the texts and which split is read.
        overwrite: start anew if the folder holds an unfinished run or a sparse model.
        layout: "dense" or "bitmask", see `save_sparse`.
        **options: the options of a method given by name, such as `rank=8, steps=500`, and `reconstruct=` for the
            `BlockReconstruction` of "reconstruct".

    Returns:
        The recovered model, in evaluation mode, where it was trained.

    Raises:
        ValueError: arguments that contradict each other, a dense model, a teacher that does not fit, too few data, an
            output folder with other files or with a run of other arguments.
        RuntimeError: a zero was lost, or no weight changed.
    """
    check_tokenizer(tokenizer)
    chosen = as_method(method, options)
    if isinstance(chosen, Reconstruction) and teacher is None:
        raise ValueError("method='reconstruct' trains towards the dense model: pass teacher=")
    output = Output(output_dir, overwrite=overwrite, layout=layout)
    if output.processes.count > 1:
        raise ValueError("recover runs in one process; for several, use SparsityCallback or sparse_lora in a Trainer")
    where = {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "auto_class": auto_class,
        "length": length,
        "seed": seed,
        "column": column,
        "split": split,
    }
    job = prepare(model, data, chosen, **where)
    facts = job.facts()
    output.begin("recover", facts)
    if output.is_complete:
        return load_sparse(output_dir, auto_class=auto_class).eval()
    before = output.journal.once("loss", "before", lambda: _loss(job.model, job.held_out))
    # A reconstruction starts from the dense model, so earlier recoveries are no part of its result.
    stored = getattr(job.model.config, "sparsity_config", None) or {}
    previous = None if isinstance(chosen, Reconstruction) else stored.get("recovered")
    result = _train(job, output.journal)
    loss = {"before": before, "after": _loss(result, job.held_out)}
    if not loss["after"] < loss["before"] and not isinstance(chosen, TrainToSparsity):
        logger.warning("the held-out loss did not fall: %.4f before, %.4f after", loss["before"], loss["after"])
    _write(result, facts | {"loss": loss, "previous": previous}, output, job.tokenizer)
    return result


def _train(job: Preparation, journal: Journal) -> Any:
    """Returns the recovered model; raises RuntimeError if a zero was lost or no weight changed."""
    zeros, weights = _zeros(job.model), weights_fingerprint(job.model)
    if isinstance(job.method, Reconstruction):
        result = _reconstruct(job, journal)
    else:
        method = _planned(job, journal) if isinstance(job.method, TrainToSparsity) else job.method
        result = retrain(job.model, job.teacher, job.rows, method, job.seed, journal)
        _check_kept(zeros, _zeros(result))
        check_zeros(result)
    if weights_fingerprint(result) == weights:
        rate = "" if isinstance(job.method, Reconstruction) else f" with lr={job.method.lr:g}; give a larger lr"
        raise RuntimeError(f"no weight changed in {job.method.steps} steps{rate}")
    return result


def _planned(job: Preparation, journal: Journal) -> Any:
    """Returns the method with its plan, which is made on training sequences if only a config was given, and remembered."""
    method = job.method
    if method.plan is not None:
        return method
    plan = journal.once("plan", "", lambda: make_plan(job.model, method.config, job.rows[:PLANNING]).to_dict())
    return replace(method, plan=Plan.from_dict(plan), config=None)


def _reconstruct(job: Preparation, journal: Journal) -> Any:
    """Prunes a copy of the teacher by the model's plan, with reconstruction, into a folder inside the unfinished one."""
    model, teacher = job.model, job.teacher
    plan, place = model_plan(model), journal.folder / "model"
    assert plan is not None
    if weight_store(teacher) is not None:
        raise ValueError(
            "a streamed teacher cannot be copied; call prune(teacher, plan, batches, reconstruct=...) on it"
        )
    if (place / CONFIG_NAME).exists() and not (place / MARKER).exists():
        result = type(model).from_pretrained(place, dtype=teacher.dtype)
    else:
        result = copy.deepcopy(teacher)
        prune(result, plan, job.rows, reconstruct=job.method.blocks, output_dir=place)
    if measure_sparsity(result).sparsity < measure_sparsity(model).sparsity - 1e-3:
        raise RuntimeError("the reconstructed model has fewer zeros than the one it replaces; please report this")
    return result.eval()


def _loss(model: Any, held_out: Tensor) -> float:
    """Returns the mean next-token loss on token ids `[n, length]`, in nats per token."""
    return math.log(evaluate_text(model, held_out).perplexity)


def _zeros(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Returns, for each parameter with planned weights, one bit per value: 1 where the value is 0."""
    names = {weight.parameter for weight in planned_layers(model).weights.values()}
    return {n: np.packbits((p.detach() == 0).cpu().numpy()) for n, p in model.named_parameters() if n in names}


def _check_kept(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    before = {n: bits for n, bits in before.items() if n in after}  # a plan made on the way may leave layers dense
    lost = {n: int(np.unpackbits(bits & ~after[n]).sum()) for n, bits in before.items() if (bits & ~after[n]).any()}
    if lost:
        name = next(iter(lost))
        raise RuntimeError(
            f"training lost zeros in {len(lost)} parameters, {lost[name]} in {name}; nothing was written"
        )


def _write(model: Any, record: Mapping[str, Any], output: Output, tokenizer: Any) -> None:
    """Writes the folder, with `record` in the config as what was done."""
    stored = dict(model.config.sparsity_config) | {"recovered": dict(record)}
    if stored.get("pruned", {}).get("gradual"):
        stored["pruned"] = {"arguments": {}} | stored["pruned"]  # no run of `prune`: the record has all its arguments
    model.config.sparsity_config = stored
    renew_identity(model, output.path)
    reconstructed = output.journal.folder / "model" / REPORT_FILE
    report = Report.load(reconstructed) if reconstructed.exists() else measure_sparsity(model, masks=True)
    with output.finishing(model, report, tokenizer) as place:
        model.save_pretrained(place)
        check_written(place.glob("*.safetensors"), report.layers)
