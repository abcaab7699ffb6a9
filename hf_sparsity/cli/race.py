"""`hf-sparsity race`: let the allocators compete on this model, keep the best plan, and prove it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..records import Comparison, Interval
from .arguments import add_calibration, add_config, add_model, add_plan_file

HELP = (
    "try the allocators, improve on the best (with --search for as long as you like), certify the plan against uniform"
)
ROWS = 15  # of the table; all are in the plan


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(command)
    add_config(command, allocator=False)
    add_calibration(command)
    command.add_argument(
        "--candidates",
        nargs="+",
        default=[],
        metavar="NAME",
        help="allocators that take part; uniform always does (default: all but msp, which searches by itself)",
    )
    command.add_argument("--search", action="store_true", help="evolve the best plans until the budget is spent")
    command.add_argument(
        "--budget",
        metavar="BUDGET",
        help="a time such as 90s, 10m or 2h, '2000 evals' or '50M tokens' (default: none for the race, 10m for the search)",
    )
    command.add_argument(
        "--descent",
        type=int,
        metavar="STEPS",
        help="at most so many steps downhill from the best of them; 0: none (default: 24)",
    )
    command.add_argument("--metric", default="kl", help="kl or loss (default: %(default)s)")
    command.add_argument(
        "--report",
        metavar="FILE",
        help="an .html page of it: intervals, the search over time, the best plans side by side, what was measured",
    )
    add_plan_file(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the plan and writes it; prints who did how well."""
    from ..checkpoint.plan_file import PlanFile
    from ..pictures.files import check_page
    from ..pictures.report import draw_report
    from ..planning.make_plan import make_plan
    from .loading import calibration, hidden_limit, load, sparsity_config

    report = check_page(options.report, overwrite=options.overwrite) if options.report else None
    output = PlanFile(options.output, overwrite=options.overwrite)
    if report and report.resolve() == output.path.resolve():
        raise ValueError(f"plan and report both go to {options.output!r}; give them different names")
    given = {"budget": options.budget, "descent": options.descent}
    options.allocator = {
        "name": "search" if options.search else "race",
        "candidates": options.candidates,
        "metric": options.metric,
        **{name: value for name, value in given.items() if value is not None},
    }
    config = sparsity_config(options)
    model, tokenizer = load(options)
    batches = calibration(options, config, model, tokenizer, planning=True)
    start = time.perf_counter()
    made = make_plan(model, config, batches, output_dir=output, hidden_limit=hidden_limit(options))
    seconds = time.perf_counter() - start
    output.save(made)
    if report and output.processes.main:
        draw_report(made, report)
    assert made.chosen is not None
    if output.processes.main and not options.json:
        print(summary(made.chosen, seconds))
        print(f"plan written to {options.output}")
        if report:
            print(f"report written to {options.report}")
    return {
        "plan": options.output,
        **({"report": options.report} if report else {}),
        "sparsity": made.sparsity,
        "seconds": round(seconds, 1),
        "chosen": dict(made.chosen),
    }


def summary(chosen: Mapping[str, Any], seconds: float) -> str:
    """The table of the candidates, the winner, its certificate and what it cost."""
    from .tables import render

    metric, spent, data = chosen["metric"], chosen["spent"], chosen["data"]
    table = chosen["candidates"]
    shown = [*table[:ROWS], *(row for row in table[ROWS:] if row["kind"] == "uniform")]
    tokens = chosen["slices"]
    header = ["plan", "kind", *(f"{metric} ({n} tokens)" for n in tokens), "perplexity", f"uniform - plan ({metric})"]
    lines = [render(header, [_row(row, metric, len(tokens)) for row in shown])]
    if len(table) > len(shown):
        lines.append(f"and {len(table) - len(shown)} more, all in the plan")
    if "descent" in chosen:
        found = chosen["descent"]
        lines.append(
            f"descent from {found['from']}: {found['gains']} of {found['steps']} steps taken, {found['stopped']}"
        )
    if "search" in chosen:
        found = chosen["search"]
        lines.append(f"search: {found['generations']} generations, {found['stopped']}")
    if "sources" in chosen:
        lines.append(by_source(chosen["sources"]))
    lines += [
        f"winner: {chosen['winner']} ({100 * chosen['confidence']:g} % intervals; within noise the simpler plan wins)",
        certificate(chosen["certificate"]),
        f"cost: {spent['evals']} evaluations, {spent['tokens']} tokens, {seconds:.0f} s; "
        f"sequences for statistics {data['statistics']}, choice {data['selection']}, certificate {data['certificate']}",
    ]
    return "\n".join(lines)


def by_source(sources: Mapping[str, Any]) -> str:
    """The chosen plan beside uniform on each source of the calibration mix, where the certificate is scored."""
    from .tables import render

    rows = [[n, str(x["sequences"]), f"{x['uniform']:.4f}", f"{x['chosen']:.4f}"] for n, x in sources.items()]
    return render(["source", "sequences", "kl uniform", "kl chosen"], rows)


def certificate(made: Mapping[str, Any]) -> str:
    """Returns what the plan gains over uniform on text that took no part in choosing it, in words."""
    compared = Comparison.from_dict(made)
    head = f"certificate, on {compared.predictions} predictions of text that nothing before has seen:"
    return "\n  ".join([head, *compared.lines()])


def _row(row: Mapping[str, Any], metric: str, rounds: int) -> Sequence[str]:
    values = [f"{value:.4f}" for value in row[metric]]
    interval = "" if row["kind"] == "uniform" else str(Interval.from_dict(row["uniform_minus"]))
    return [
        row["name"],
        row["kind"],
        *values,
        *[""] * (rounds - len(values)),
        f"{row['perplexity']:.2f}",
        interval,
    ]
