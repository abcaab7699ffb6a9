"""`hf-sparsity inspect`: compare what a sparse model's plan says with what its weights hold; as a table or a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_model_class

if TYPE_CHECKING:
    from ..pictures.grid import Grid
    from ..plan import Plan, Report

HELP = "show the sparsity of a model or plan by block and projection, reached against planned; or compare two"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    command.add_argument("path", help="a sparse model's folder, or a plan.json")
    command.add_argument("second", nargs="?", help="another version of the same model, to see the difference")
    command.add_argument(
        "--plot",
        metavar="FILE",
        help="draw it as a .png or an .html page, both with matplotlib; an existing file is replaced",
    )
    add_model_class(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints a table by block and projection, for two models also their difference; draws the picture that is asked for.

    Raises:
        FileNotFoundError: no such folder or plan.
        ValueError: models that cannot be compared, or a picture that cannot be drawn.
    """
    from ..pictures.files import check_picture
    from ..pictures.grid import check_alike, make_grid

    plot = check_picture(options.plot) if options.plot else None
    paths = [Path(path) for path in (options.path, options.second) if path is not None]
    plans = [_plan(path) for path in paths]
    if len(plans) > 1:
        check_alike(*plans)
    reports = [_count(path, plan, options.model_class) for path, plan in zip(paths, plans, strict=True)]
    results = []
    for plan, report in zip(plans, reports, strict=True):
        if not options.json:
            _show(plan, report)
        results.append(_numbers(plan, report))
    result: dict[str, Any] = results[0] if len(results) == 1 else {"first": results[0], "second": results[1]}
    if len(paths) > 1 or plot:
        names = _names(paths) if len(paths) > 1 else [None]
        grids = [make_grid(*model) for model in zip(plans, reports, names, strict=True)]
        if len(grids) > 1 and not options.json:
            _show_difference(*grids)
        if plot:
            result["plot"] = _draw(grids, plot, speak=not options.json)
    return result


def _plan(path: Path) -> Plan:
    """The plan in a finished folder or a file."""
    from ..files import check_finished
    from ..plan import Plan

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a sparse model, or a plan.json")
    check_finished(path)
    return Plan.load(path)


def _count(path: Path, plan: Plan, model_class: str | None) -> Report | None:
    """Counts the zeros in the weights of a folder; None for a plan that stands alone."""
    if not path.is_dir():
        return None
    from transformers.utils import CONFIG_NAME

    from ..checkpoint.streamed import open_streamed
    from ..checkpoint.zeros import REPORT_FILE
    from ..model.loading import load_model
    from ..model.sparsity import measure_sparsity
    from ..pictures.grid import check_report
    from ..plan import Report, read_json

    if (path / REPORT_FILE).exists():
        Report.load(path / REPORT_FILE)  # a damaged report is an error, not something to look past
    packed = "quantization_config" in read_json(path / CONFIG_NAME)
    report = measure_sparsity((load_model if packed else open_streamed)(path, auto_class=model_class))
    check_report(plan, report)
    return report


def _show(plan: Plan, report: Report | None) -> None:
    from . import tables

    print(tables.plan_header(plan))
    print(tables.plan_table(plan, report))
    if report is not None:
        print(tables.after(report))


def _numbers(plan: Plan, report: Report | None) -> dict[str, Any]:
    return {
        "target": plan.target,
        "planned": plan.sparsity,
        "reached": report.sparsity if report else None,
        "config": dict(plan.config),
        "layers": {
            name: {
                "planned": layer.sparsity,
                "reached": report.layers[name].sparsity if report else None,
                "measure": layer.measure,
            }
            for name, layer in plan.layers.items()
        },
    }


def _names(paths: list[Path]) -> list[str | None]:
    """Names for two paths: as few of their last components as tell them apart."""
    first, second = (path.resolve() for path in paths)
    for end in (1, 2, 3):
        names: list[str | None] = ["/".join(path.parts[-end:]) for path in (first, second)]
        if names[0] != names[1]:
            return names
    return [str(path) for path in paths]


def _show_difference(first: Grid, second: Grid) -> None:
    from . import tables

    rows = []
    for block, cells in first.cells.items():
        after = second.cells[block]
        change = {p: 100 * (after[p].shown - cell.shown) for p, cell in cells.items()}
        rows.append([block, *(f"{change[p]:+.1f}" if p in change else "" for p in first.projections)])
    print(f"{second.name} minus {first.name}, in percentage points")
    print(tables.render(["block", *first.projections], rows))


def _draw(grids: list[Grid], plot: Path, *, speak: bool) -> str:
    """Draws the picture and returns its path."""
    from ..pictures.heatmaps import draw_png
    from ..pictures.pages import draw_html
    from ..pictures.panels import make_picture

    replaced = plot.exists()
    (draw_png if plot.suffix.lower() == ".png" else draw_html)(make_picture(*grids), plot)
    if speak:
        print(f"picture written to {plot}{' (replaced)' if replaced else ''}")
    return str(plot)
