"""`hf-sparsity demo`: every allocator on the embedded model; the best is saved and drawn."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from .arguments import parse_algorithm

HELP = "prune the embedded model with every allocator, compare, save the best, draw it"
SEQUENCES = 32  # of calibration; eight more are the text by which the best is chosen


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("--sparsity", type=float, default=0.6)
    command.add_argument("--pruner", default="wanda", metavar="NAME[:KEY=VALUE,...]")
    command.add_argument(
        "--output", default="hf_sparsity_demo", metavar="FOLDER", help="new or empty folder (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every allocator on the embedded model; the best by calibration text is saved and drawn."""
    from .. import demo as demo_model
    from ..allocators import ALLOCATORS
    from ..calibration.calibration import calibration_batches
    from ..checkpoint.atomic import check_output
    from ..checkpoint.save import save_sparse
    from ..config import SparsityConfig
    from ..evaluation.perplexity import evaluate_text, text_windows
    from ..pictures.png import check_matplotlib, draw_plans
    from ..planning.make_plan import make_plan
    from ..pruning.prune import prune
    from . import tables
    from .loading import DEMO_LENGTH, heldout_text, load_demo

    check_matplotlib()  # before the work, not after it
    output = check_output(options.output)
    base = SparsityConfig(sparsity=options.sparsity, pruner=parse_algorithm(options.pruner))
    start = time.perf_counter()
    dense, tokenizer = load_demo()
    calibration = calibration_batches(
        [text for _, text in demo_model.texts("calibration")],
        tokenizer,
        sequences=SEQUENCES + 8,
        length=DEMO_LENGTH,
        seed=0,
    )
    calibration, selection = calibration[:SEQUENCES], calibration[SEQUENCES:]
    heldout = text_windows(heldout_text(), tokenizer, DEMO_LENGTH)
    before = evaluate_text(dense, heldout).perplexity
    rows: list[dict[str, Any]] = []
    plans = {}
    for name, allocator, row_allocator in _runs():
        config = SparsityConfig(
            sparsity=base.sparsity, pruner=base.pruner, allocator=allocator, row_allocator=row_allocator
        )
        model, _ = load_demo()
        began = time.perf_counter()
        plans[name] = make_plan(model, config, calibration)
        report = prune(model, plans[name], calibration)
        seconds = time.perf_counter() - began
        chosen_by = evaluate_text(model, selection).perplexity
        rows.append(
            {
                "allocator": name,
                "sparsity": report.sparsity,
                "selection": chosen_by,
                "heldout": evaluate_text(model, heldout).perplexity,
                "seconds": seconds,
            }
        )
        if not options.json:
            print(f"{name}: held-out perplexity {rows[-1]['heldout']:.2f} in {seconds:.0f} s", file=sys.stderr)
        if min(rows, key=lambda row: row["selection"]) is rows[-1]:
            best, best_report = model, report
    winner = min(rows, key=lambda row: row["selection"])["allocator"]
    save_sparse(best, output, report=best_report, tokenizer=tokenizer)
    plans[winner].save(output / "plan.json")
    by_layer = {name: plan for name, plan in plans.items() if name in ALLOCATORS}  # row allocators leave layers alone
    picture = draw_plans(by_layer, output / "sparsities.png")
    if not options.json:
        print(tables.demo_table(rows, before, winner, base))
        print(
            f"saved {winner} to {output}, the picture of all plans to {picture} ({time.perf_counter() - start:.0f} s in all)"
        )
    return {"dense": before, "rows": rows, "best": winner, "output": str(output), "picture": str(picture)}


def _runs() -> list[tuple[str, Any, Any]]:
    """(name, allocator, row allocator) of each row of the table."""
    from ..allocators import ALLOCATORS, ROW_ALLOCATORS

    runs: list[tuple[str, Any, Any]] = [
        (name, {"name": name, **allocator.demo_options}, None) for name, allocator in ALLOCATORS.items()
    ]
    return runs + [(f"uniform + {name}", "uniform", name) for name in ROW_ALLOCATORS]
