"""`hf-sparsity demo`: some allocators, or all, on the embedded model; the best is saved and drawn."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json
from .arguments import add_compute_dtype, parse_algorithm

if TYPE_CHECKING:
    from ..config import SparsityConfig
    from ..plan import Plan, Report

HELP = "prune the embedded model with some allocators, or --all, compare, save the best, draw it"
SEQUENCES = 32  # calibration sequences
SELECTION = 8  # further sequences, by which the best allocator is chosen
WINDOWS = 48  # of the held-out text, evenly spread; with --all: all
# A race that is over in a minute: two formulas, a short slice of text, a few steps downhill.
SHORT_RACE = {"name": "race", "candidates": ("owl", "fisher"), "slices": (2048, 4096), "descent": 2}
RECORD = "demo.json"  # in the output: what was asked for and what came of it
FAILS = "alphapruning"  # on this model; on others it is among the best


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    command.add_argument("--sparsity", type=float, default=0.6)
    command.add_argument("--pruner", default="wanda", metavar="NAME[:KEY=VALUE,...]")
    add_compute_dtype(command)
    command.add_argument("--all", action="store_true", help="every allocator, on all of the held-out text")
    command.add_argument(
        "--output", default="hf_sparsity_demo", metavar="FOLDER", help="new or empty folder (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prunes the embedded model with several allocators; the best by calibration text is saved and drawn."""
    from .. import demo as demo_model
    from ..allocators import ALLOCATORS
    from ..calibration.calibration import calibration_batches
    from ..checkpoint.atomic import check_output
    from ..checkpoint.save import save_sparse
    from ..config import SparsityConfig
    from ..evaluation.perplexity import evaluate_text, text_windows
    from ..pictures.canvas import check_matplotlib
    from ..pictures.heatmaps import draw_plans
    from . import tables
    from .loading import heldout_text, load_demo

    base = SparsityConfig(
        sparsity=options.sparsity, pruner=parse_algorithm(options.pruner), compute_dtype=options.compute_dtype
    )
    asked = {**base.to_dict(), "all": options.all}
    if (done := finished(options.output, asked)) is not None:
        if not options.json:
            print(tables.demo_table(done["rows"], done["dense"], done["best"], base))
            print(f"{options.output} is complete already, of a run with the same arguments; nothing was computed")
        return done
    check_matplotlib()  # before the work, not after it
    output = check_output(options.output)
    chosen = runs(every=options.all)
    if not options.json:
        print(announcement(chosen, options), flush=True)
    start = time.perf_counter()
    dense, tokenizer = load_demo()
    texts = [text for _, text in demo_model.texts("calibration")]
    data = calibration_batches(texts, tokenizer, sequences=SEQUENCES + SELECTION, length=demo_model.LENGTH, seed=0)
    heldout = text_windows(heldout_text(), tokenizer, demo_model.LENGTH)
    if not options.all:
        heldout = heldout[:: max(1, len(heldout) // WINDOWS)][:WINDOWS]
    before = evaluate_text(dense, heldout, compute_dtype=options.compute_dtype).perplexity

    rows: list[dict[str, Any]] = []
    plans: dict[str, Plan] = {}
    for name, allocator, row_allocator in chosen:
        config = replace(base, allocator=allocator, row_allocator=row_allocator)
        model, plans[name], report, row = _try(name, config, data, heldout)
        rows.append(row)
        if not options.json:
            note = f"{name}: held-out perplexity {row['heldout']:.2f} in {row['seconds']:.0f} s"
            print(note, file=sys.stderr, flush=True)
        if min(rows, key=lambda row: row["selection"]) is row:
            best, best_report = model, report

    winner = min(rows, key=lambda row: row["selection"])["allocator"]
    save_sparse(best, output, report=best_report, tokenizer=tokenizer)
    plans[winner].save(output / "plan.json")
    by_layer = {name: plan for name, plan in plans.items() if name in (*ALLOCATORS, "race")}  # rows leave layers alone
    picture = draw_plans(by_layer, output / "sparsities.png")
    if not options.json:
        print(tables.demo_table(rows, before, winner, base))
        took = time.perf_counter() - start
        print(f"saved {winner} to {output}, the picture of all plans to {picture} ({took:.0f} s in all)")
    result = {"dense": before, "rows": rows, "best": winner, "output": str(output), "picture": str(picture)}
    write_json(output / RECORD, {"asked": asked, "result": result})
    return result


def finished(output: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the result of a demo that is in the output folder already; None where there is none.

    Raises:
        ValueError: it is of a run with other arguments.
    """
    file = Path(output) / RECORD
    if not file.is_file():
        return None
    record = read_json(file)
    before = record.get("asked") if isinstance(record, dict) else None
    if before != asked:
        differing = [key for key in asked if not isinstance(before, dict) or before.get(key) != asked[key]]
        raise ValueError(
            f"output {output!r} is complete already, of a demo with another {' and '.join(differing)}; choose another folder, "
            "or remove it"
        )
    return record["result"]


def _try(name: str, config: SparsityConfig, data: Any, heldout: Any) -> tuple[Any, Plan, Report, dict[str, Any]]:
    """(model, plan, report, row of the table) of the embedded model pruned by one config.

    `data`: token ids `[SEQUENCES + SELECTION, demo.LENGTH]`; the last ones judge. `heldout`: windows of another text.
    """
    from ..evaluation.perplexity import evaluate_text
    from ..planning.make_plan import make_plan
    from ..pruning.prune import prune
    from .loading import load_demo

    model, _ = load_demo()
    start = time.perf_counter()
    plan = make_plan(model, config, data[:SEQUENCES])
    report = prune(model, plan, data[:SEQUENCES])
    seconds = time.perf_counter() - start
    row = {
        "allocator": name,
        "sparsity": report.sparsity,
        "selection": evaluate_text(model, data[SEQUENCES:], compute_dtype=config.compute_dtype).perplexity,
        "heldout": evaluate_text(model, heldout, compute_dtype=config.compute_dtype).perplexity,
        "seconds": seconds,
    }
    return model, plan, report, row


def announcement(chosen: list[tuple[str, Any, Any]], options: argparse.Namespace) -> str:
    """Returns what will be done, and how long it takes."""
    names = ", ".join(name for name, *_ in chosen)
    how_long = "a quarter of an hour" if options.all else "two to three minutes"
    rest = "" if options.all else f"; {FAILS} fails on this model, though not on others. --all tries every allocator"
    return (
        f"The embedded model, a Llama of four million weights, loses {100 * options.sparsity:.0f} % of them in "
        f"{len(chosen)} ways ({names}), with calibration text from Python's standard library, and is judged on modules that "
        f"it never saw. About {how_long} on two CPU cores{rest}."
    )


def runs(*, every: bool) -> list[tuple[str, Any, Any]]:
    """(name, allocator, row allocator) of each row of the table; `every`: all there are, else a few that show how they differ."""
    from ..allocators import ALLOCATORS, ROW_ALLOCATORS

    if not every:
        return [(name, name, None) for name in ("uniform", "owl", FAILS)] + [("race", SHORT_RACE, None)]
    runs: list[tuple[str, Any, Any]] = [
        (name, {"name": name, **allocator.demo_options}, None) for name, allocator in ALLOCATORS.items()
    ]
    return [*runs, *((f"uniform + {name}", "uniform", name) for name in ROW_ALLOCATORS), ("race", "race", None)]
