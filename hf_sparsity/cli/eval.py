"""`hf-sparsity eval`: measures perplexity and task scores; a sparse model's folder keeps the result."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import add_compute_dtype, add_model

if TYPE_CHECKING:
    from ..evaluation.metrics import Metrics, TaskRecord, TextRecord

HELP = "perplexity on texts and scores on tasks; with --against also how far it is from the dense model"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    add_model(command)
    add_compute_dtype(command)
    command.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="DATA",
        help="wikitext2, c4 or ptb as in the papers, a local file or folder, or a Hub dataset; repeatable "
        "(default for 'demo' shapes: its held-out text)",
    )
    command.add_argument("--split", help="split of a folder or Hub dataset (default: test)")
    command.add_argument("--column", help="column of a dataset that holds the text")
    command.add_argument("--length", type=int, help="tokens per window (default: 2048 or the model's limit)")
    command.add_argument("--windows", type=int, help="score only the first N windows of each text")
    command.add_argument(
        "--tasks", metavar="NAME[,NAME...]", help="tasks of lm-evaluation-harness (pip install 'hf_sparsity[eval]')"
    )
    command.add_argument(
        "--include-path",
        metavar="FOLDER",
        help="task files of your own; trust them as you would a script: the harness renders their templates unguarded",
    )
    command.add_argument("--shots", type=int, help="examples in a task's prompt (default: the task's)")
    command.add_argument(
        "--limit", type=float, help="at most this many documents of each task; below 1, this share of them"
    )
    command.add_argument("--batch-size", type=int, default=8, help="task requests at a time (default: %(default)s)")
    command.add_argument("--against", metavar="MODEL", help="the dense model to compare with")
    command.add_argument(
        "--resamples", type=int, default=1000, help="draws of the bootstrap behind the intervals (default: %(default)s)"
    )
    command.add_argument(
        "--seed", type=int, default=0, help="seed of the bootstrap and of the tasks (default: %(default)s)"
    )
    command.add_argument(
        "--no-record", action="store_true", help="do not add the results to the folder's sparsity_metrics.json"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the model, prints tables, and returns what was measured and where it was recorded."""
    from .. import demo as demo_model
    from ..evaluation.evaluate import evaluate, recordable
    from ..evaluation.metrics import METRICS_FILE
    from ..evaluation.tasks import find_tasks
    from ..evaluation.texts import Text, read_text
    from .loading import DEMO, load

    is_demo = DEMO in (options.model, options.against)
    names = [name for name in (options.tasks or "").split(",") if name]
    if not options.text and not names and not is_demo:
        raise ValueError("--text or --tasks is missing: wikitext2, a local text file, arc_easy, ...")
    texts: list[Any] = [read_text(name, split=options.split, column=options.column) for name in options.text]
    length = options.length
    if not texts and not names:
        texts = [Text("demo held-out", [text for _, text in demo_model.texts("heldout")])]
        length = length or demo_model.LENGTH
    # Before a large model is loaded for nothing.
    tasks = find_tasks(names, options.include_path, trust_remote_code=options.trust_remote_code) if names else ()
    model, tokenizer = load(options)
    against = None
    if options.against is not None:
        against, _ = load(argparse.Namespace(**{**vars(options), "model": options.against}))
    metrics = evaluate(
        model,
        texts=texts,
        tasks=tasks,
        against=against,
        tokenizer=tokenizer,
        length=length,
        windows=options.windows,
        shots=options.shots,
        limit=options.limit,
        batch_size=options.batch_size,
        resamples=options.resamples,
        seed=options.seed,
        record=False if options.no_record else options.model,
        compute_dtype=options.compute_dtype,
        trust_remote_code=options.trust_remote_code,
    )
    recorded = f"{options.model}/{METRICS_FILE}" if not options.no_record and recordable(options.model) else None
    if not options.json:
        print(show(metrics))
        if recorded:
            print(f"recorded in {recorded}")
    return {**metrics.to_dict(), "recorded": recorded}


def show(metrics: Metrics) -> str:
    """Returns the tables of texts and tasks, with a line below about how each was measured."""
    parts = ([_texts(metrics.texts)] if metrics.texts else []) + ([_tasks(metrics.tasks)] if metrics.tasks else [])
    return "\n\n".join(parts)


def _texts(records: tuple[TextRecord, ...]) -> str:
    from .tables import render

    header = ["text", "perplexity"]
    rows = [[record.name, str(record.perplexity)] for record in records]
    if any(record.against for record in records):
        header += ["dense perplexity", "ratio", "KL, nats a token", "same first token"]
        for row, record in zip(rows, records, strict=True):
            dense = record.against
            row += [str(x) for x in (dense.perplexity, dense.ratio, dense.kl, dense.top1)] if dense else [""] * 4
    notes = [
        f"{r.name}: {r.predictions} predictions in {r.windows} windows of {r.length}; "
        + (f"{100 * r.confidence:g} % intervals by bootstrap over {r.documents} {r.unit}s" if r.documents > 1 else "")
        for r in records
    ]
    return "\n".join([render(header, rows), *notes])


def _tasks(records: tuple[TaskRecord, ...]) -> str:
    from .tables import render

    header, rows = ["task", "metric", "score"], []
    compared = any(record.against for record in records)
    for record in records:
        for metric, score in record.metrics.items():
            row = [record.name, metric, _score(score)]
            if compared:
                dense = record.against
                row += [_score(dense.metrics.get(metric)), str(dense.difference.get(metric, ""))] if dense else ["", ""]
            rows.append(row)
    notes = [
        f"{r.name}: version {r.version}, {r.samples} documents, {r.shots} examples in the prompt; "
        f"lm-evaluation-harness {r.harness}"
        for r in records
    ]
    return "\n".join([render([*header, *(["dense", "difference"] if compared else [])], rows), *notes])


def _score(score: Any) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
