"""`evaluate`: perplexity and task scores of a model, compared with the dense one and recorded in its folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..calibration.batches import data_fingerprint as data_fingerprint
from ..calibration.positions import check_length, default_length
from ..files import check_finished
from ..model.accepted import check_kind
from ..model.classes import location_of, require_next_token
from ..model.fingerprint import versions, weights_fingerprint
from ..model.loading import find_tokenizer, load_model
from ..model.precision import compute_dtype as dtype_of
from ..model.precision import recorded_name
from ..plan import read_json
from ..validation import check_compute_dtype, check_number
from .metrics import Metrics, TextAgainst, TextRecord
from .perplexity import score_windows
from .resampling import CONFIDENCE, RESAMPLES, Resampling
from .tasks import BATCH, Tasks, find_tasks, score_tasks
from .texts import Text, Windows, cut, read_text

logger = logging.getLogger(__name__)


def evaluate(
    model: PreTrainedModel | str | os.PathLike[str],
    *,
    texts: str | Text | Sequence[str | Text] = (),
    tasks: str | Sequence[str] | Tasks = (),
    against: PreTrainedModel | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    split: str | None = None,
    column: str | None = None,
    length: int | None = None,
    windows: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    shots: int | None = None,
    limit: float | None = None,
    batch_size: int = BATCH,
    resamples: int = RESAMPLES,
    seed: int = 0,
    record: bool | str | os.PathLike[str] = True,
    compute_dtype: str = "auto",
    **loading: Any,
) -> Metrics:
    """Measures perplexity on texts and scores on tasks, compares with the dense model, records it in the folder.

    Perplexity follows the papers, see `perplexity.PROTOCOL`. Its interval, and those of the comparison, are paired
    bootstraps over documents (`texts.cut` says what a document is).

    Args:
        model: a loaded model, a folder or a Hub id.
        texts: `"wikitext2"`, `"c4"`, `"ptb"`, local text files or Hub datasets (see `read_text`), or `Text`s.
        tasks: names that lm-evaluation-harness knows, or that `include_path` defines; or what `find_tasks` found.
        against: the dense model, of the same vocabulary.
        tokenizer: by default the one beside the model.
        split: of Hub datasets, by default the one that the papers measure on, or "test".
        column: of datasets, by default the first with texts.
        length: tokens in a window; by default 2048, or the model's limit if that is smaller.
        windows: at most this many of each text, from its beginning.
        include_path: a folder of task files; see `find_tasks`.
        shots: examples in a task's prompt; by default the task's own number.
        limit: at most this many documents of each task; below 1, this share of them.
        batch_size: task requests that run at a time.
        resamples: how often the bootstrap draws.
        seed: of the bootstrap and of the tasks' random numbers.
        record: add the results to `sparsity_metrics.json`: in the model's folder when a folder is given as `model`, or in
            the folder named here. A dense model's folder gets no record, and a warning says so.
        compute_dtype: the precision of both models' forward passes, see `SparsityConfig`; weights stay as they are stored.
        **loading: to `from_pretrained` of both (`dtype`, `device_map`, `trust_remote_code`, ...).

    Returns:
        What was measured now, as it is recorded.

    Raises:
        ValueError: nothing to measure, no tokenizer, unknown tasks or data, models that cannot be compared, outputs that
            are NaN. All but the last before a window is scored.
    """
    texts = [texts] if isinstance(texts, (str, Text)) else list(texts)
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not texts and not tasks:
        raise ValueError(
            "nothing to evaluate: give texts, such as 'wikitext2' or a local file, or tasks, such as 'arc_easy'"
        )
    check_compute_dtype(compute_dtype)
    for given_model in (model, against):
        if given_model is not None and not isinstance(given_model, (str, os.PathLike)):
            check_kind(given_model)
    least = {"length": 2, "windows": 1, "shots": 0, "batch_size": 1, "resamples": 1}
    numbers = {"length": length, "windows": windows, "shots": shots, "batch_size": batch_size, "resamples": resamples}
    for name, number in numbers.items():
        if number is not None:
            check_number(name, number, f"[{least[name]}, inf)", whole=True)
    if limit is not None:
        check_number("limit", limit, "(0, inf)", hint=": documents, or a share of them below 1")
    folder = _record_folder(model, record)
    if folder is not None:
        Metrics.load(folder)  # a damaged record is an error now, not after the work
    read = [text if isinstance(text, Text) else read_text(text, split=split, column=column) for text in texts]
    if tasks and not isinstance(tasks, Tasks):
        tasks = find_tasks(tasks, include_path, trust_remote_code=bool(loading.get("trust_remote_code")))
    tokenizer = tokenizer or _tokenizer(model, loading)
    if tokenizer is None:
        raise ValueError(
            f"{_name(model)} has no tokenizer, so texts cannot be scored; save one beside it, or give tokenizer="
        )
    model = _load(model, loading)
    reference = None if against is None else (_name(against), _load(against, loading))
    length = length or default_length(model, tokenizer)
    for judged in (model, *(reference or ())[1:]):
        require_next_token(judged, "evaluation", decoder_only=bool(texts))
        check_length(judged, length)
    how: dict[str, Any] = {"resamples": resamples, "seed": seed, "compute_dtype": compute_dtype}
    measured = [_measure(model, cut(text, tokenizer, length, windows), reference, **how) for text in read]
    metrics = _record(folder, Metrics(texts=tuple(measured)))
    if isinstance(tasks, Tasks):
        options: dict[str, Any] = {"shots": shots, "limit": limit, "batch_size": batch_size, **how}
        scored = score_tasks(model, tokenizer, tasks, reference, **options)
        metrics = metrics.updated(_record(folder, Metrics(tasks=tuple(scored))))
    return metrics


def _measure(
    model: PreTrainedModel,
    windows: Windows,
    reference: tuple[str, PreTrainedModel] | None,
    *,
    resamples: int,
    seed: int,
    compute_dtype: str,
) -> TextRecord:
    text, ids, units = windows.text, windows.ids, windows.units
    other = reference[1] if reference is not None else None
    scores = score_windows(model, ids, other, compute_dtype=compute_dtype)
    columns = [scores.predictions, scores.loss]
    if scores.reference is not None and scores.kl is not None and scores.same is not None:
        columns += [scores.reference, scores.kl, scores.same]
    each = np.stack(columns, axis=1)
    if not np.isfinite(each).all():
        raise ValueError(
            f"a model's output is NaN or infinite on {text.name}: load it in bfloat16 or float32, or check it"
        )
    sums = np.zeros((int(units.max()) + 1, each.shape[1]))
    np.add.at(sums, units, each)
    statistics = Resampling(sums, resamples, seed)
    against = None
    if reference is not None:
        against = TextAgainst(
            reference[0],
            weights_fingerprint(reference[1]),
            perplexity=statistics.interval(lambda s: np.exp(s[..., 2] / s[..., 0])),
            ratio=statistics.interval(lambda s: np.exp((s[..., 1] - s[..., 2]) / s[..., 0])),
            kl=statistics.interval(lambda s: s[..., 3] / s[..., 0]),
            top1=statistics.interval(lambda s: s[..., 4] / s[..., 0]),
        )
    return TextRecord(
        name=text.name,
        split=text.split,
        data=data_fingerprint([{"input_ids": ids}]),
        length=ids.shape[1],
        windows=len(ids),
        unit=windows.unit,
        documents=len(sums),
        predictions=int(scores.predictions.sum()),
        weights=weights_fingerprint(model),
        perplexity=statistics.interval(lambda s: np.exp(s[..., 1] / s[..., 0])),
        against=against,
        confidence=CONFIDENCE,
        resamples=resamples,
        seed=seed,
        versions=versions(),
        compute_dtype=recorded_name(model, dtype_of(model, compute_dtype)),
    )


def recordable(folder: str | os.PathLike[str]) -> bool:
    """Returns whether this is a sparse model's folder; `ValueError` when its run was interrupted."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    check_finished(folder)
    return "sparsity_config" in read_json(config)


def _record_folder(model: Any, record: bool | str | os.PathLike[str]) -> Path | None:
    if record is False or (record is True and isinstance(model, PreTrainedModel)):
        return None
    folder = model if record is True else record
    if recordable(folder):
        return Path(folder)
    logger.warning("%s is not a sparse model's folder: the results are shown, not recorded", folder)
    return None


def _record(folder: Path | None, metrics: Metrics) -> Metrics:
    if folder is not None:
        Metrics.load(folder).updated(metrics).save(folder)
    return metrics


def _load(model: Any, loading: dict[str, Any]) -> PreTrainedModel:
    return load_model(model, **{"dtype": "auto", **loading}) if isinstance(model, (str, os.PathLike)) else model


def _tokenizer(model: Any, loading: dict[str, Any]) -> Any:
    source = model.name_or_path if isinstance(model, PreTrainedModel) else model
    return find_tokenizer(source, **location_of(loading)) if source else None


def _name(model: Any) -> str:
    """Returns a folder's last part, a Hub id, or what a loaded model came from; never a path of this machine."""
    source = str(model.name_or_path or type(model).__name__) if isinstance(model, PreTrainedModel) else str(model)
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else source
