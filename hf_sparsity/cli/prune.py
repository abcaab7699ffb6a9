"""`hf-sparsity prune`: from a plan or in one go, resumable, streamed if asked."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_calibration, add_config, add_model, add_output

HELP = "prune a model, from a plan or in one go, and save it"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(command)
    command.add_argument(
        "--plan",
        metavar="FILE",
        help="carry out this plan (a JSON file or a sparse model's folder) instead of making one",
    )
    add_config(command)
    add_calibration(command)
    add_output(command)
    command.add_argument(
        "--layout",
        choices=("dense", "bitmask"),
        default="dense",
        help="how zeros are stored: like other numbers, which loads everywhere, or as bits, which needs this package "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--stream",
        action="store_true",
        help="for models larger than memory: read each block from disk when its turn comes, and write it at once",
    )
    command.add_argument(
        "--reconstruct",
        action="store_true",
        help="train each half-block's survivors against the dense model's, without labels; zeros are held",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Plans unless a plan is given, prunes, saves; goes on where an earlier run was interrupted."""
    from ..calibration.batches import prepare_batches
    from ..checkpoint.output import Output
    from ..checkpoint.zeros import folder_bytes
    from ..core.stats import STATS
    from ..model.layers import find_layers
    from ..plan import Plan
    from ..planning.checks import check_plan, plan_config
    from ..planning.make_plan import make_plan
    from ..planning.transfer import verdict
    from ..pruning.prune import prune as prune_model
    from ..pruning.reconstruction import BlockReconstruction
    from ..streaming.memory import describe, estimate_memory
    from . import tables
    from .loading import calibration, hidden_limit, load, needed, sparsity_config
    from .race import certificate

    made = Plan.load(options.plan) if options.plan else None
    if made is not None and options.sparsity is not None:
        raise ValueError("give --plan or --sparsity, not both: a plan carries its config")
    config = plan_config(made) if made else sparsity_config(options)
    output = Output(options.output, overwrite=options.overwrite, layout=options.layout)
    speaks = output.processes.main and not options.json
    limit = hidden_limit(options)
    model, tokenizer = load(options)
    model_layers = find_layers(model, config.ignore)
    if made is not None:
        check_plan(made, model, model_layers)
    reconstruct = BlockReconstruction() if options.reconstruct else None
    # A mix is reported on, and a plan from elsewhere is checked, whatever the pruner needs.
    always = options.reconstruct or len(options.calibration or ()) > 1 or bool(made and options.calibration)
    batches = calibration(options, config, model, tokenizer, planning=made is None, always=always)
    needs = needed(config, planning=made is None) & STATS
    prepared = output.processes.share(prepare_batches(model, batches)) if batches is not None else []
    estimate = estimate_memory(model, model_layers, prepared, needs, hidden_limit=limit, journal=True)
    if speaks:
        print(tables.before(describe(model_layers, model), estimate))
    if made is None:
        made = make_plan(model, config, batches, output_dir=output, hidden_limit=limit)
    report = prune_model(
        model, made, batches, output_dir=output, hidden_limit=limit, tokenizer=tokenizer, reconstruct=reconstruct
    )
    if speaks:
        print(tables.plan_table(made, report))
        print(tables.after(report))
        if checked := model.config.sparsity_config["pruned"].get("revalidation"):
            print(verdict(checked))
        if report.sources:
            print(tables.by_source(report))
        scored = model.config.sparsity_config["pruned"].get("certificate")
        if made.chosen and scored:
            print(certificate(made.chosen["certificate"]))
            print(f"  of the pruned model, there: kl {scored['kl']:.4f}, perplexity {scored['perplexity']:.4f}")
        zeros = "zeros are stored like other numbers" if options.layout == "dense" else "zeros are stored as bits"
        print(f"saved to {output.path} ({folder_bytes(output.path) / 2**20:.1f} MiB: {zeros})")
    return {
        "output": str(output.path),
        "sparsity": report.sparsity,
        "target": report.target,
        "seconds": report.seconds,
        "notes": report.notes,
        "skipped": report.skipped,
        "sources": report.sources,
        "bytes": folder_bytes(output.path),
    }
