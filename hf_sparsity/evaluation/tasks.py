"""Benchmarks through lm-evaluation-harness (the extra `[eval]`), around a model that is already in memory.

The harness is a program of its own with thousands of tasks: most read their data from the Hub, and its task files are
more than data. It imports the Python that `!function` names and renders templates without a sandbox. The installed tasks
are as trusted as the package; a folder of one's own is to be trusted as a script is, and Python is imported from it
only with `trust_remote_code`. Tasks that run code which the model wrote are never run.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..model.fingerprint import versions, weights_fingerprint
from ..model.inference import evaluating
from ..model.precision import compute_dtype as dtype_of
from ..model.precision import computing_as, recorded_name
from .metrics import TaskAgainst, TaskRecord
from .resampling import CONFIDENCE, RESAMPLES
from .task_results import differences, documents, prompt_examples, shown, task_scores

BATCH = 8  # requests that run at a time
_CODE = re.compile(r"!function|^\s*class\s*:", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """Names of tasks, groups and tags, and the harness' manager that knows them."""

    names: tuple[str, ...]
    manager: Any


def find_tasks(
    names: Sequence[str], include_path: str | os.PathLike[str] | None = None, *, trust_remote_code: bool = False
) -> Tasks:
    """Finds tasks by their names, without loading their data.

    Args:
        names: tasks, groups or tags of lm-evaluation-harness, or of the folder.
        include_path: a folder with task files of one's own (YAML); they win over the harness' of the same name.
        trust_remote_code: lets them import Python, by `!function` or `class`.

    Raises:
        ValueError: the harness is not installed, no such task or folder, or task files that would import Python.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-evaluation-harness: pip install 'hf_sparsity[eval]'")
    path = None if include_path is None else str(include_path)
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"include path {path!r} is not a folder; give one with task files (YAML)")
    if path is not None and not trust_remote_code:
        _check_folder(Path(path))
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=path, include_defaults=False) if path is not None else None
        if manager is None or not all(leaf in manager.task_index for name in names for leaf in _leaves(manager, name)):
            manager = TaskManager(include_path=path)  # takes seconds: the harness has thousands
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            raise ValueError(
                f"lm-evaluation-harness knows no task {name!r}{hint} 'lm-eval ls tasks' lists what it knows, and an include "
                "path adds your own"
            )
        for leaf in _leaves(manager, name):
            if leaf in manager.task_index and (manager.task_index[leaf].cfg or {}).get("unsafe_code"):
                raise ValueError(f"task {leaf!r} runs code that the model writes, which is not done here")
    return Tasks(tuple(dict.fromkeys(names)), manager)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    reference: tuple[str, PreTrainedModel] | None = None,
    *,
    shots: int | None = None,
    limit: float | None = None,
    batch_size: int = BATCH,
    resamples: int = RESAMPLES,
    seed: int = 0,
    compute_dtype: str = "auto",
) -> list[TaskRecord]:
    """Runs tasks, and compares with a dense model on the same documents.

    Args:
        tokenizer: of both models.
        reference: the dense model, and its name in the record.
        shots: examples in the prompt; by default the task's own number.
        limit: at most this many documents of each task; below 1, this share of them.
        batch_size: requests that run at a time.
        resamples: of the paired bootstrap over documents, for the difference of every metric that is a mean.
        seed: of the examples drawn, of generation, and of the bootstrap. The harness sets Python's, numpy's and torch's.
        compute_dtype: the precision of forward passes, see `SparsityConfig`.

    Raises:
        ValueError: a task cannot be run: its data could not be reached, or it wants images or code execution.
    """
    limit = int(limit) if limit is not None and limit >= 1 else limit
    options: dict[str, Any] = {
        "shots": shots,
        "limit": limit,
        "batch_size": batch_size,
        "resamples": resamples,
        "seed": seed,
    }
    with computing_as(compute_dtype, model):
        sparse = _run(model, tokenizer, tasks, **options)
    with computing_as(compute_dtype, reference[1] if reference is not None else None):
        dense = _run(reference[1], tokenizer, tasks, **options) if reference is not None else None
    weights = weights_fingerprint(model)
    against = (reference[0], weights_fingerprint(reference[1])) if reference is not None else None
    records = []
    for name in shown(sparse):
        other = None
        if dense is not None and against is not None:
            other = TaskAgainst(*against, task_scores(dense, name), differences(sparse, dense, name, resamples, seed))
        records.append(
            TaskRecord(
                name=name,
                version=sparse["versions"].get(name),
                shots=prompt_examples(sparse, name),
                limit=limit,
                samples=int(sparse["results"][name].get("sample_len") or len(documents(sparse, name))),
                weights=weights,
                metrics=task_scores(sparse, name),
                against=other,
                confidence=CONFIDENCE,
                resamples=resamples,
                seed=seed,
                harness=_version(),
                versions=versions(),
                compute_dtype=recorded_name(model, dtype_of(model, compute_dtype)),
            )
        )
    return records


def _run(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    *,
    shots: int | None,
    limit: float | None,
    batch_size: int,
    resamples: int,
    seed: int,
) -> Mapping[str, Any]:
    with _quiet(), evaluating(model):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        # A copy, because the harness gives tokenizers a padding token.
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=resamples,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (ConnectionError, FileNotFoundError, KeyError, ValueError) as error:
            raise ValueError(
                f"tasks {', '.join(tasks.names)} cannot be run: {error or type(error).__name__}"
            ) from error
    assert results is not None  # only on other processes than the first
    return results


def _leaves(manager: Any, name: str) -> Iterator[str]:
    """The tasks of a group or tag, or the name itself, whether it is known or not."""
    entry = manager.task_index.get(name)
    config = (entry.cfg or {}) if entry is not None else {}
    members = config.get("task", []) if "group" in config else []
    members = members or (entry.tags if entry is not None and entry.cfg is None else [])
    for member in sorted(m if isinstance(m, str) else str(m.get("task", m.get("group"))) for m in members):
        yield from _leaves(manager, member)
    if not members:
        yield name


def _check_folder(folder: Path) -> None:
    """Raises `ValueError` when a folder's task files import Python. Meant against surprise; it is not a sandbox."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    for path in files:
        is_task = (
            path.suffix in (".yaml", ".yml", "") or "yaml" in path.name
        )  # what `include` names has often no suffix
        if is_task and _CODE.search(path.read_text(encoding="utf-8", errors="ignore")):
            raise ValueError(
                f"{path} imports Python (!function or class); read it, then allow that with --trust-remote-code "
                "(trust_remote_code=True)"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness' prints go to stderr, its bars and warnings only where a person looks; its bootstrap stays in this process."""
    harness = logging.getLogger("lm_eval")
    level, before = harness.level, os.environ.get("DISABLE_MULTIPROC")
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        harness.setLevel(logging.ERROR)
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield
        finally:
            harness.setLevel(level)
            if before is None:
                del os.environ["DISABLE_MULTIPROC"]
            else:
                os.environ["DISABLE_MULTIPROC"] = before


def _version() -> str:
    from importlib import metadata

    return metadata.version("lm_eval")
