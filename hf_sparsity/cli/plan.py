"""`hf-sparsity plan`: decide how sparse each layer shall be, and write it down."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_calibration, add_config, add_model, add_plan_file

HELP = "decide the sparsity of each layer and write the plan"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    add_model(command)
    add_config(command)
    add_calibration(command)
    add_plan_file(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes a plan and writes it."""
    from ..checkpoint.plan_file import PlanFile
    from ..planning.make_plan import make_plan
    from . import tables
    from .loading import calibration, hidden_limit, load, sparsity_config

    output = PlanFile(options.output, overwrite=options.overwrite)
    config = sparsity_config(options)
    model, tokenizer = load(options)
    batches = calibration(options, config, model, tokenizer, planning=True)
    plan = make_plan(model, config, batches, output_dir=output, hidden_limit=hidden_limit(options))
    output.save(plan)
    if output.processes.main and not options.json:
        print(tables.plan_table(plan))
        again = f"{options.output} is complete already, of a run with the same arguments"
        print(again if output.is_complete else f"plan written to {options.output}")
    return {"plan": options.output, "sparsity": plan.sparsity, "target": plan.target, "layers": len(plan.layers)}
