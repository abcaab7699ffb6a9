"""`hf-sparsity prune`: from a plan or in one go, resumable, streamed if asked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .arguments import add_calibration, add_config, add_layout, add_model, add_output, add_stream

if TYPE_CHECKING:
    from ..plan import Plan, Report

HELP = "prune a model, from a plan or in one go, and save it"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    add_model(command)
    command.add_argument(
        "--plan",
        metavar="FILE",
        help="carry out this plan (a JSON file or a sparse model's folder) instead of making one",
    )
    add_config(command)
    add_calibration(command)
    add_output(command)
    add_layout(command)
    add_stream(command)
    command.add_argument(
        "--reconstruct",
        action="store_true",
        help="train each half-block's survivors against the dense model's, without labels; zeros are held",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plans unless a plan is given, prunes and saves; goes on where an earlier run was interrupted."""
    from ..checkpoint.output import Output
    from ..checkpoint.zeros import folder_bytes
    from ..plan import Plan
    from ..planning.checks import plan_config
    from ..planning.make_plan import make_plan
    from ..planning.preparation import Prepared
    from ..pruning.prune import prune
    from ..pruning.reconstruction import BlockReconstruction
    from . import tables
    from .loading import calibration, hidden_limit, load, sparsity_config

    plan = Plan.load(options.plan) if options.plan else None
    if plan is not None and options.sparsity is not None:
        raise ValueError("give --plan or --sparsity, not both: a plan carries its config")
    config = plan_config(plan) if plan else sparsity_config(options)
    output = Output(options.output, overwrite=options.overwrite, layout=options.layout)
    speaks = output.processes.main and not options.json
    limit = hidden_limit(options)
    model, tokenizer = load(options)
    # A mix is reported on, and a plan from elsewhere is checked, whatever the pruner needs.
    always = options.reconstruct or len(options.calibration or ()) > 1 or bool(plan and options.calibration)
    batches = calibration(options, config, model, tokenizer, planning=plan is None, always=always)

    def show(run: Prepared) -> None:
        if speaks:
            print(tables.before(run.describe(), run.estimate))

    planned_here = plan is None
    if plan is None:
        plan = make_plan(model, config, batches, output_dir=output, hidden_limit=limit, on_start=show)
    report = prune(
        model,
        plan,
        batches,
        output_dir=output,
        hidden_limit=limit,
        tokenizer=tokenizer,
        reconstruct=BlockReconstruction() if options.reconstruct else None,
        on_start=None if planned_here else show,
    )
    size = folder_bytes(output.path)
    if speaks and output.is_complete:
        print(f"{output.path} is complete already, of a run with the same arguments; nothing was computed")
    elif speaks:
        print(_outcome(plan, report, model.config.sparsity_config["pruned"]))
        zeros = "zeros are stored like other numbers" if options.layout == "dense" else "zeros are stored as bits"
        print(f"saved to {output.path} ({size / 2**20:.1f} MiB: {zeros})")
    return {
        "output": str(output.path),
        "sparsity": report.sparsity,
        "target": report.target,
        "seconds": report.seconds,
        "notes": report.notes,
        "skipped": report.skipped,
        "sources": report.sources,
        "bytes": size,
    }


def _outcome(plan: Plan, report: Report, pruned: Mapping[str, Any]) -> str:
    """What pruning did, in tables and sentences; `pruned` is what the model's config keeps of the run."""
    from ..planning.transfer import verdict
    from ..records import Comparison
    from . import tables
    from .race import certificate

    parts = [tables.plan_table(plan, report), tables.after(report)]
    parts += [line] if (line := tables.refined(report)) else []
    if checked := pruned.get("revalidation"):
        parts.append(verdict(checked))
    if report.sources:
        parts.append(tables.by_source(report))
    if plan.chosen and (scored := pruned.get("certificate")):
        parts.append(certificate(Comparison.from_dict(plan.chosen["certificate"])))
        parts.append(f"  of the pruned model, there: kl {scored['kl']:.4f}, perplexity {scored['perplexity']:.4f}")
    return "\n".join(parts)
