"""`hf-sparsity inspect`: what a sparse model or plan says, and what is there; in words, or as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pictures.grid import Grid
    from ..plan import Plan, Report

HELP = "what a sparse model or plan has by block and projection, reached against planned; two are compared"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("path", help="a sparse model's folder, or a plan.json")
    command.add_argument("second", nargs="?", help="another version of the same model, to see the difference")
    command.add_argument(
        "--plot",
        metavar="FILE",
        help="draw it: a .png (needs matplotlib) or an .html page that needs nothing; an existing file is replaced",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A table by block and projection, or two and their difference; and the picture of it.

    Raises:
        ValueError, FileNotFoundError: no such folder or plan, models that cannot be compared, nowhere to draw.
    """
    from ..pictures.files import check_picture
    from ..pictures.grid import check_alike, make_grid

    plot = check_picture(options.plot) if options.plot else None
    paths = [Path(path) for path in (options.path, options.second) if path is not None]
    plans = [_plan(path) for path in paths]
    if len(plans) > 1:
        check_alike(*plans)
    reports = [_count(path, plan) for path, plan in zip(paths, plans, strict=True)]
    results = []
    for plan, report in zip(plans, reports, strict=True):
        if not options.json:
            _show(plan, report)
        results.append(_numbers(plan, report))
    result: dict[str, Any] = results[0] if len(results) == 1 else {"first": results[0], "second": results[1]}
    if len(paths) > 1 or plot:
        names = _names(paths) if len(paths) > 1 else [None]
        grids = [make_grid(*one) for one in zip(plans, reports, names, strict=True)]
        if len(grids) > 1 and not options.json:
            _show_difference(*grids)
        if plot:
            result["plot"] = _draw(grids, plot, speak=not options.json)
    return result


def _plan(path: Path) -> Plan:
    from ..files import check_finished
    from ..plan import Plan

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a sparse model, or a plan.json")
    check_finished(path)
    return Plan.load(path)


def _count(path: Path, plan: Plan) -> Report | None:
    """The zeros that are in a folder's weights, counted; None for a plan that stands alone."""
    if not path.is_dir():
        return None
    from transformers.utils import CONFIG_NAME

    from ..checkpoint.streamed import open_streamed
    from ..checkpoint.zeros import REPORT_FILE
    from ..model.sparsity import measure_sparsity
    from ..pictures.grid import check_report
    from ..plan import Report, read_json
    from .loading import auto_class

    if (path / REPORT_FILE).exists():
        Report.load(path / REPORT_FILE)  # a damaged report is an error, not something to look past
    kind = auto_class(path)
    packed = "quantization_config" in read_json(path / CONFIG_NAME)
    report = measure_sparsity(kind.from_pretrained(path) if packed else open_streamed(path, auto_class=kind))
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
    """The last parts of two paths, as far as they differ."""
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
        by = {p: 100 * (after[p].shown - cell.shown) for p, cell in cells.items()}
        rows.append([block, *(f"{by[p]:+.1f}" if p in by else "" for p in first.projections)])
    print(f"{second.name} minus {first.name}, in percentage points")
    print(tables.render(["block", *first.projections], rows))


def _draw(grids: list[Grid], plot: Path, *, speak: bool) -> str:
    from ..pictures.html import draw_html
    from ..pictures.panels import make_picture
    from ..pictures.png import draw_png

    replaced = plot.exists()
    (draw_png if plot.suffix.lower() == ".png" else draw_html)(make_picture(*grids), plot)
    if speak:
        print(f"picture written to {plot}{' (replaced)' if replaced else ''}")
    return str(plot)
