"""`hf-sparsity inspect`: what a sparse model or plan says, and what is there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "table of a sparse model or plan: per block and projection, reached against planned"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("path", help="a sparse model's folder, or a plan.json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A table per block and projection, reached against planned."""
    from transformers.utils import CONFIG_NAME

    from ..hf.checkpoint import REPORT_FILE
    from ..hf.evaluate import measure_sparsity
    from ..hf.journal import check_finished
    from ..hf.source import open_streamed
    from ..plan import Plan, Report, read_json
    from . import tables
    from .loading import auto_class

    path = Path(options.path)
    check_finished(path)
    made = Plan.load(path)
    report = None
    if path.is_dir():
        if (path / REPORT_FILE).exists():
            Report.load(path / REPORT_FILE)  # a damaged report is an error, not something to look past
        kind = auto_class(path)
        packed = "quantization_config" in read_json(path / CONFIG_NAME)
        model = kind.from_pretrained(path) if packed else open_streamed(path, auto_class=kind)
        report = measure_sparsity(model)
    if not options.json:
        print(tables.plan_header(made))
        print(tables.plan_table(made, report))
        if report is not None:
            print(tables.after(report))
    return {
        "target": made.target,
        "planned": made.sparsity,
        "reached": report.sparsity if report else None,
        "config": dict(made.config),
        "layers": {
            name: {
                "planned": layer.sparsity,
                "reached": report.layers[name].sparsity if report else None,
                "measure": layer.measure,
            }
            for name, layer in made.layers.items()
        },
    }
