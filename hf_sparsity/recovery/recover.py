"""`recover`: one call from a sparse model to a better one with the same zeros, in a folder that says what was done.

While it runs, the folder has `UNFINISHED/` with a journal and the Trainer's checkpoints; `config.json` comes last. A run
that was interrupted goes on when it is called again with the same arguments, and ends with the same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import math
import os
import random
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..calibration.batches import data_fingerprint as data_fingerprint
from ..calibration.batches import prepare_batches
from ..calibration.calibration import calibration_batches, default_length, read_documents
from ..calibration.mixture import SELF, Mixture, sources_in
from ..calibration.sequences import packed_rows
from ..checkpoint.journal import Journal
from ..checkpoint.output import Output
from ..checkpoint.zeros import REPORT_FILE, check_written
from ..evaluation.perplexity import evaluate_text
from ..files import MARKER, check_finished
from ..model.fingerprint import versions, weights_fingerprint
from ..model.loading import find_tokenizer, load_sparse
from ..model.offload import weight_store
from ..model.sparsity import check_zeros, measure_sparsity, model_plan, planned_layers
from ..plan import Report
from .distillation import check_teacher, check_weights
from .training import Options, retrain

logger = logging.getLogger(__name__)

METHODS = ("lora", "full", "reconstruct")
STEPS = {"lora": 200, "full": 200, "reconstruct": 16}
# Adam's best learning rate goes with 1 / width (Yang et al. 2022): these times 1 / width are 6e-3 and 1e-3 for the
# embedded model, where half and twice as much were worse on calibration text; 2.8e-4 and 4.7e-5 for a width of 4096.
RATE = {"lora": 1.152, "full": 0.192}
HELDOUT = 16  # one sequence in so many is never trained on,
LARGEST_HELDOUT = 128  # up to this many


def recover(
    model: PreTrainedModel | str | os.PathLike[str],
    data: Any,
    method: str = "lora",
    *,
    output_dir: str | os.PathLike[str],
    teacher: PreTrainedModel | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    steps: int | None = None,
    tokens: int | None = None,
    length: int | None = None,
    batch: int = 8,
    lr: float | None = None,
    seed: int = 0,
    rank: int = 16,
    accumulation: int = 1,
    hard: float = 1.0,
    soft: float = 1.0,
    hidden: float = 0.0,
    temperature: float = 1.0,
    reconstruct: Any = None,
    training: Mapping[str, Any] | None = None,
    column: str | None = None,
    split: str = "train",
    overwrite: bool = False,
    layout: str = "dense",
) -> Any:
    """Trains what pruning left of a causal language model, keeps every zero, and writes the result to a folder.

        recover("pruned", "corpus.jsonl", output_dir="recovered", teacher="dense")

    One sequence in 16 of the data is held out to measure the loss before and after; `sparsity_config["recovered"]` in
    the folder's `config.json` has both, with the method, its options, the data's fingerprint and the versions.

    Args:
        model: a sparse model or its folder. With "lora" and "full" a model in memory is changed in place.
        data: as for `calibration_batches`: texts, a dataset, a file, or token ids `[n, t]`; a list of `Source` for a mix,
            in which `"self"` are samples of the teacher, or of the sparse model without one.
        method: "lora", masked adapters that are merged at the end; "full", all weights, with the zeros held, in float32;
            "reconstruct", pruning the teacher again by the model's plan, each part trained towards the dense one (the
            number of zeros is the plan's, but they need not be in the same places).
        output_dir: a new or empty folder, or one with an interrupted run of the same arguments, which goes on.
        teacher: the dense model or its folder: needed for "reconstruct"; the others distil from it, see
            `DistillationTrainer`.
        tokenizer: by default the folder's own; saved along.
        steps, tokens: how long: optimizer steps (by default 200), or instead the tokens to train on. For "reconstruct"
            steps x batch is the number of sequences, by default 128.
        length: tokens of a sequence; by default 2048 or the model's limit.
        batch: sequences of an optimizer step, in `accumulation` parts.
        lr: the largest learning rate of a cosine schedule; the default goes with 1 / width.
        seed: of the data's order and the adapters.
        rank: of the adapters, with alpha twice that.
        hard, soft, hidden, temperature: with a teacher, see `DistillationTrainer`.
        reconstruct: a `BlockReconstruction`, for that method.
        training: more `TrainingArguments`, such as `{"gradient_checkpointing": True}`.
        column, split: of a dataset.
        overwrite: start anew if the folder holds an unfinished run or a sparse model.
        layout: of the files, "dense" or "bitmask", see `save_sparse`.

    Returns:
        The recovered model, in evaluation mode, where it was trained.

    Raises:
        ValueError: arguments that contradict each other, a dense model, a teacher that does not fit, too few data, an
            output folder with other files or with a run of other arguments.
        RuntimeError: a zero was lost, or no weight changed.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: one of {', '.join(METHODS)} is expected")
    if method == "reconstruct" and teacher is None:
        raise ValueError("method='reconstruct' trains towards the dense model: pass teacher=")
    output = Output(output_dir, overwrite=overwrite, layout=layout)
    if output.processes.count > 1:
        raise ValueError("recover runs in one process; for several, use SparsityCallback or sparse_lora in a Trainer")
    if tokenizer is None and isinstance(model, (str, os.PathLike)):
        tokenizer = find_tokenizer(model)
    sparse, dense = _sparse(model), _teacher(teacher)
    length = length or (data.shape[1] if isinstance(data, Tensor) else default_length(sparse, tokenizer))
    options = Options(
        method=method,
        steps=_steps(method, steps, tokens, batch * length),
        batch=batch,
        length=length,
        lr=lr if lr is not None else RATE.get(method, 0.0) / sparse.config.get_text_config().hidden_size,
        seed=seed,
        rank=rank,
        accumulation=accumulation,
        hard=hard,
        soft=soft,
        hidden=hidden,
        temperature=temperature,
        training=dict(training or {}),
    )
    _check(options, sparse, dense)
    spec = _reconstruction(reconstruct) if method == "reconstruct" else None
    rows, heldout = _split(_rows(data, tokenizer, options, column, split, sparse if dense is None else dense))
    prepare_batches(sparse, torch.cat([rows, heldout]))  # for its checks
    facts = _facts(options, spec, sparse, dense, rows, heldout)
    output.begin("recover", facts)
    journal = output.journal
    before = journal.once("loss", "before", lambda: _loss(sparse, heldout))
    zeros, weights = _zeros(sparse), weights_fingerprint(sparse)
    if method == "reconstruct":
        result = _reconstruct(sparse, dense, rows, spec, journal)
    else:
        result = retrain(sparse, dense, rows, options, journal)
        _check_kept(zeros, _zeros(result))
    if weights_fingerprint(result) == weights:
        raise RuntimeError(f"no weight changed in {options.steps} steps with lr={options.lr:g}; give a larger lr")
    after = _loss(result, heldout)
    if not after < before:
        logger.warning("the held-out loss did not fall: %.4f before, %.4f after", before, after)
    known = result.config.sparsity_config
    done = facts | {"loss": {"before": before, "after": after}, "previous": known.get("recovered")}
    result.config.sparsity_config = dict(known) | {"recovered": done}
    _finish(result, output, tokenizer)
    return result


# ---- what is asked for


def _sparse(model: Any) -> Any:
    """The model, loaded if it is a folder; `ValueError` unless it has its zeros in memory."""
    if isinstance(model, (str, os.PathLike)):
        return load_sparse(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a sparse transformers model or its folder is expected, not a {type(model).__name__}")
    if weight_store(model) is not None or any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("the model is offloaded or streamed; what is trained must be in memory")
    check_zeros(model)
    return model


def _teacher(teacher: Any) -> Any:
    if not isinstance(teacher, (str, os.PathLike)):
        return teacher
    from transformers import AutoModelForCausalLM

    if os.path.isdir(teacher):
        check_finished(teacher)
    return AutoModelForCausalLM.from_pretrained(teacher)


def _steps(method: str, steps: int | None, tokens: int | None, each: int) -> int:
    if steps is not None and tokens is not None:
        raise ValueError("give steps or tokens, not both")
    return STEPS[method] if steps is None and tokens is None else steps if steps is not None else -(-tokens // each)  # type: ignore[operator]


def _check(options: Options, model: Any, teacher: Any) -> None:
    for name in ("steps", "batch", "length", "rank", "accumulation"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number above 0 is expected")
    if options.batch % options.accumulation:
        raise ValueError(
            f"batch={options.batch} sequences cannot be cut into accumulation={options.accumulation} parts"
        )
    if options.method != "reconstruct" and not options.lr > 0:
        raise ValueError(f"lr={options.lr!r}: a number above 0 is expected")
    if options.method == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError("method='lora' needs peft: pip install 'hf_sparsity[recovery]', or use method='full'")
    if model.config.is_encoder_decoder:
        raise ValueError("recover is for causal language models; train others in a Trainer with SparsityCallback")
    if teacher is not None:
        check_teacher(model, teacher)
        check_weights(options.hard, options.soft, options.hidden, options.temperature)


def _rows(data: Any, tokenizer: Any, options: Options, column: str | None, split: str, writer: Any) -> Tensor:
    """Token ids `[n, length]`: as many as are needed, or as there are; of a mix or of samples all that are needed."""
    if isinstance(data, Tensor):
        return calibration_batches(data, length=options.length)
    wanted = math.ceil(options.steps * options.batch * HELDOUT / (HELDOUT - 1)) + 1
    if sources_in(data, column) is not None or (isinstance(data, str) and data == SELF):
        how = {"seed": options.seed, "column": column, "split": split, "model": writer}
        made = calibration_batches(data, tokenizer, sequences=wanted, length=options.length, **how)
        return made.ids if isinstance(made, Mixture) else made
    documents = read_documents(data, tokenizer, column, split, options.seed, random.Random(options.seed))
    rows = packed_rows(documents, tokenizer, wanted, options.length)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, options.length)


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(to train on, held out): the last 1 / 16, at least one sequence."""
    if len(rows) < 2:
        raise ValueError(
            f"the data fill {len(rows)} sequences; at least one to train on and one to judge by are needed"
        )
    held = min(LARGEST_HELDOUT, max(1, len(rows) // HELDOUT))
    return rows[:-held], rows[-held:]


def _facts(options: Options, spec: Any, model: Any, teacher: Any, rows: Tensor, heldout: Tensor) -> dict[str, Any]:
    """What an interrupted run must share with the one that goes on; and what the config says was done."""
    training = options.method != "reconstruct"
    chosen = dataclasses.asdict(options)
    for name in ("method", "steps"):
        del chosen[name]
    if teacher is None or not training:
        for name in ("hard", "soft", "hidden", "temperature"):
            del chosen[name]
    if options.method != "lora":
        del chosen["rank"]
    if not training:
        chosen = {"length": options.length, "seed": options.seed, "reconstruct": dataclasses.asdict(spec)}
    used = versions()
    if options.method == "lora":
        used["peft"] = metadata.version("peft")
    return {
        "method": options.method,
        "options": chosen,
        "steps": options.steps if training else None,
        "tokens": options.steps * options.batch * options.length if training else rows.numel(),
        "data": data_fingerprint([{"input_ids": torch.cat([rows, heldout])}]) | {"heldout": len(heldout)},
        "model": weights_fingerprint(model),
        "teacher": _name(teacher) if teacher is not None else None,
        "versions": used,
    }


def _name(teacher: Any) -> dict[str, Any]:
    """A teacher's name, and a hash of its weights if they are in memory."""
    offloaded = any(p.device.type == "meta" for p in teacher.parameters())
    return {
        "name": teacher.config._name_or_path or None,
        "weights": None if offloaded else weights_fingerprint(teacher),
    }


# ---- block by block


def _reconstruction(given: Any) -> Any:
    from ..pruning.reconstruction import BlockReconstruction

    if given is not None and not isinstance(given, BlockReconstruction):
        raise ValueError(f"reconstruct is a {type(given).__name__}; a BlockReconstruction is expected")
    return given or BlockReconstruction()


def _reconstruct(model: Any, teacher: Any, rows: Tensor, spec: Any, journal: Journal) -> Any:
    """Prunes a copy of the teacher by the model's plan, with reconstruction; in a folder inside the unfinished one."""
    from ..pruning.prune import prune

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
        prune(result, plan, rows, reconstruct=spec, output_dir=place)
    if measure_sparsity(result).sparsity < measure_sparsity(model).sparsity - 1e-3:
        raise RuntimeError("the reconstructed model has fewer zeros than the one it replaces; please report this")
    return result.eval()


# ---- what came out


def _loss(model: Any, heldout: Tensor) -> float:
    """Nats per token."""
    return math.log(evaluate_text(model, heldout).perplexity)


def _zeros(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Which values of each parameter with planned weights are 0: one bit each, by name."""
    names = {weight.parameter for weight in planned_layers(model).weights.values()}
    return {n: np.packbits((p.detach() == 0).cpu().numpy()) for n, p in model.named_parameters() if n in names}


def _check_kept(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    lost = {n: int(np.unpackbits(gone & ~after[n]).sum()) for n, gone in before.items() if (gone & ~after[n]).any()}
    if lost:
        name = next(iter(lost))
        raise RuntimeError(
            f"training lost zeros in {len(lost)} parameters, {lost[name]} in {name}; nothing was written"
        )


def _finish(model: Any, output: Output, tokenizer: Any) -> None:
    made = output.journal.folder / "model" / REPORT_FILE  # by reconstruction
    report = Report.load(made) if made.exists() else measure_sparsity(model, masks=True)
    with output.finishing(report, tokenizer) as place:
        model.save_pretrained(place)
        check_written(place.glob("*.safetensors"), report.layers)
