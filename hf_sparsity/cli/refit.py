"""`hf-sparsity refit`: the best weights for the zeros of a sparse model, resumable, streamed if asked."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_calibration, add_layout, add_loading, add_output, add_refine, add_stream

HELP = "set the weights that a sparse model kept to their least-squares optimum, by its dense model and text"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of this command."""
    command.add_argument("sparse", help="a sparse model's folder or Hub id, of this package or any other")
    command.add_argument(
        "--dense",
        dest="model",
        required=True,
        metavar="MODEL",
        help="the dense model that it was pruned from: a folder or Hub id; 'demo' is the small model inside the package",
    )
    add_loading(command)
    add_refine(command)
    command.add_argument("--seed", type=int, default=0, help="of the choice of calibration text (default: %(default)s)")
    add_calibration(command)
    add_output(command)
    add_layout(command)
    add_stream(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Refits and saves; goes on where an earlier run was interrupted."""
    from .. import demo
    from ..checkpoint.output import Output
    from ..checkpoint.zeros import folder_bytes
    from ..planning.preparation import Prepared
    from ..pruning.refit import refit
    from . import tables
    from .loading import calibration_text, hidden_limit, load

    output = Output(options.output, overwrite=options.overwrite, layout=options.layout)
    speaks = output.processes.main and not options.json
    model, tokenizer = load(options)

    def show(run: Prepared) -> None:
        if speaks:
            print(tables.before(run.describe(), run.estimate))

    report = refit(
        model,
        demo.resolve(options.sparse),
        calibration_text(options, options.seed, model, tokenizer),
        refine=options.refine,
        output_dir=output,
        hidden_limit=hidden_limit(options),
        tokenizer=tokenizer,
        on_start=show,
    )
    errors = tables.errors(report)
    if speaks and output.is_complete:
        print(f"{output.path} is complete already, of a run with the same arguments; nothing was computed")
    elif speaks:
        print(tables.after(report))
        print(tables.refined(report))
        print(f"saved to {output.path} ({folder_bytes(output.path) / 2**20:.1f} MiB)")
    return {
        "output": str(output.path),
        "sparsity": report.sparsity,
        "seconds": report.seconds,
        "error": errors,
        "notes": report.notes,
        "skipped": report.skipped,
        "sources": report.sources,
    }
