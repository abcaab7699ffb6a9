"""`hf-sparsity race`: let the allocators compete on this model, keep the best plan, and prove it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..race_record import CandidateRecord, RaceRecord
from ..records import Comparison, SourcePlans
from .arguments import add_calibration, add_config, add_model, add_plan_file

HELP = (
    "try the allocators, improve on the best (with --search for as long as you like), certify the plan against uniform"
)
ROWS = 15  # plans in the printed table; the JSON has all


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
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
        help="largest number of steps downhill from the best of them; 0: none (default: 24)",
    )
    command.add_argument("--metric", default="kl", help="kl or loss (default: %(default)s)")
    command.add_argument(
        "--report",
        metavar="FILE",
        help="an .html page of it, drawn with matplotlib: intervals, the search over time, the best plans side by side, what was measured",
    )
    add_plan_file(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the plan and writes it; prints how each candidate did."""
    from ..checkpoint.plan_file import PlanFile
    from ..pictures.files import check_page
    from ..pictures.report import draw_report
    from ..planning.make_plan import make_plan
    from .loading import calibration, hidden_limit, load, sparsity_config

    output = PlanFile(options.output, overwrite=options.overwrite)
    again = output.path.exists()  # of a run of the same arguments, or nothing is done
    report = check_page(options.report, overwrite=options.overwrite or again) if options.report else None
    if report and report.resolve() == output.path.resolve():
        raise ValueError(f"plan and report both go to {options.output!r}; give them different names")
    limits = {"budget": options.budget, "descent": options.descent}
    options.allocator = {
        "name": "search" if options.search else "race",
        "candidates": options.candidates,
        "metric": options.metric,
        **{name: value for name, value in limits.items() if value is not None},
    }
    config = sparsity_config(options)
    model, tokenizer = load(options)
    batches = calibration(options, config, model, tokenizer, planning=True)
    start = time.perf_counter()
    plan = make_plan(model, config, batches, output_dir=output, hidden_limit=hidden_limit(options))
    seconds = time.perf_counter() - start
    output.save(plan)
    drawn = report is not None and not (output.is_complete and report.exists())
    if report and drawn and output.processes.main:
        draw_report(plan, report)
    assert plan.chosen is not None
    if output.processes.main and not options.json:
        print(summary(RaceRecord.from_dict(plan.chosen), None if output.is_complete else seconds))
        done = f"{options.output} is complete already, of a run with the same arguments"
        print(done if output.is_complete else f"plan written to {options.output}")
        if drawn:
            print(f"report written to {options.report}")
    return {
        "plan": options.output,
        **({"report": options.report} if report else {}),
        "sparsity": plan.sparsity,
        "seconds": round(seconds, 1),
        "chosen": dict(plan.chosen),
    }


def summary(race: RaceRecord, seconds: float | None) -> str:
    """Returns the table of the candidates, the winner, its certificate and what it cost.

    `seconds`: None where they are not known, of a plan that was made before.
    """
    from .tables import render

    shown = [*race.candidates[:ROWS], *(other for other in race.candidates[ROWS:] if other.kind == "uniform")]
    rounds = [f"{race.metric} ({tokens} tokens)" for tokens in race.slices]
    header = ["plan", "kind", *rounds, "perplexity", f"uniform - plan ({race.metric})"]
    lines = [render(header, [_row(candidate, len(rounds)) for candidate in shown])]
    if len(race.candidates) > len(shown):
        lines.append(f"and {len(race.candidates) - len(shown)} more, all in the plan")
    if race.descent is not None:
        gains, steps = race.descent["gains"], race.descent["steps"]
        lines.append(f"descent from {race.descent['from']}: {gains} of {steps} steps taken, {race.descent['stopped']}")
    if race.search is not None:
        lines.append(f"search: {race.search['generations']} generations, {race.search['stopped']}")
    if race.sources is not None:
        lines.append(by_source(race.sources))
    data, took = race.data, "" if seconds is None else f", {seconds:.0f} s"
    lines += [
        f"winner: {race.winner} ({100 * race.confidence:g} % intervals; within noise the simpler plan wins)",
        certificate(race.certificate),
        f"cost: {race.spent['evals']} evaluations, {race.spent['tokens']} tokens{took}; "
        f"sequences for statistics {data['statistics']}, choice {data['selection']}, certificate {data['certificate']}",
    ]
    return "\n".join(lines)


def by_source(sources: Mapping[str, SourcePlans]) -> str:
    """Returns the chosen plan beside uniform on each source of the calibration mix, on the certificate's text."""
    from .tables import render

    rows = [[name, str(x.sequences), f"{x.uniform:.4f}", f"{x.chosen:.4f}"] for name, x in sources.items()]
    return render(["source", "sequences", "kl uniform", "kl chosen"], rows)


def certificate(compared: Comparison) -> str:
    """Returns what the plan gains over uniform on text that took no part in choosing it, in words."""
    head = f"certificate, on {compared.predictions} predictions of text that nothing before has seen:"
    return "\n  ".join([head, *compared.lines()])


def _row(candidate: CandidateRecord, rounds: int) -> Sequence[str]:
    scores = [f"{score:.4f}" for score in candidate.scores]
    return [
        candidate.name,
        candidate.kind,
        *scores,
        *[""] * (rounds - len(scores)),
        f"{candidate.perplexity:.2f}",
        "" if candidate.kind == "uniform" else str(candidate.uniform_minus),
    ]
