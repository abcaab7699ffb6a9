"""Panels of a picture as a matplotlib figure: colours by block and projection, and dots by block."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from ..plan import Plan, Report
from . import colours
from .canvas import Drawing, as_drawing, as_png, check_matplotlib, plain_style
from .compare import side_by_side
from .grid import make_grid, model_name
from .panels import Dots, Heat, Picture, brief, clean, make_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, TALLEST = 0.28, 11.2  # inches: of a row, and of all rows together
COLUMN = 0.44  # inches
WIDEST = 12.0  # inches of panels beside each other on a page
STEPS = 48  # of a scale of colours; from 50 on matplotlib draws it as a bitmap, which a page may not show
LETTER = 0.07  # inches: width of a letter of a panel's title


def draw_card(plan: Plan, report: Report | None, file: str | os.PathLike[str]) -> Path:
    """Writes the picture of a model card: sparsity by block and projection, and the measure behind it. Returns `file`.

    Raises ValueError without matplotlib, or when the report lacks a layer of the plan.
    """
    return draw_png(make_picture(make_grid(plan, report)), file)


def draw_plans(plans: Mapping[str, Plan], file: str | os.PathLike[str]) -> Path:
    """Writes a PNG of several plans of one model, a panel each and four in a row. Returns `file`."""
    first = next(iter(plans.values()))
    layers = {clean(name): {n: layer.sparsity for n, layer in plan.layers.items()} for name, plan in plans.items()}
    return draw_png(replace(side_by_side(first, layers), title=model_name(first)), file, columns=4)


def draw_png(picture: Picture, file: str | os.PathLike[str], *, columns: int | None = None) -> Path:
    """Writes all panels, `columns` in a row or all beside each other, with title and notes. Returns `file`."""
    check_matplotlib()
    with plain_style():
        figure = _figure(picture, columns or len(picture.panels), len(picture.notes))
        letters = int(17 * figure.get_figwidth())  # of 7 points, on a line
        notes = [line for note in picture.notes for line in textwrap.wrap(note, letters, subsequent_indent="   ")]
        figure.suptitle(picture.title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        figure.supxlabel("\n".join(notes), fontsize=7, x=0.01, ha="left", color=colours.QUIET)
        return write_whole(file, as_png(figure))


def draw_for_page(picture: Picture) -> Drawing:
    """Returns all panels as an SVG, as many in a row as a page has room for; title and notes are for the page to say."""
    columns = int(WIDEST / _width(picture.projections))
    titles = "; ".join(panel.title.replace("\n", ", ") for panel in picture.panels)
    with plain_style():
        return as_drawing(_figure(picture, columns), f"{picture.title}: {titles}")


def _figure(picture: Picture, columns: int, notes: int = 0) -> Figure:
    from matplotlib.figure import Figure

    columns = max(1, min(columns, len(picture.panels)))
    rows = -(-len(picture.panels) // columns)
    heat = _width(picture.projections)
    widths = [2.0 if rows == 1 and isinstance(panel, Dots) else heat for panel in picture.panels[:columns]]
    names = 0.045 * max(map(len, picture.projections))  # inches that a slanted name hangs down
    height = rows * (min(ROW * picture.blocks, TALLEST / rows) + 1.5 + names) + 0.15 * notes
    figure = Figure(figsize=(sum(widths) + 1.0, height), layout="constrained", facecolor=colours.PAPER)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True, width_ratios=widths).flat)
    for axis, panel in zip(axes, picture.panels, strict=False):
        _dots(axis, panel) if isinstance(panel, Dots) else _heat(axis, panel, picture)
        letters = int((2.0 if isinstance(panel, Dots) else heat) / LETTER)
        title = [part for line in panel.title.split("\n") for part in textwrap.wrap(line, letters)]
        axis.set_title("\n".join(title), fontsize=9)
        for row in picture.breaks:
            axis.axhline(row - 0.5, color=colours.INK, linewidth=1.5)
    for axis in axes[len(picture.panels) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        places, labels = zip(*picture.ticks, strict=True)
        axis.set_yticks(places, labels, fontsize=7)
        axis.set_ylabel("block", fontsize=8)
    axes[0].set_ylim(picture.blocks - 0.5, -0.5)
    return figure


def _width(projections: Sequence[str]) -> float:
    return max(COLUMN * len(projections), 1.6)


def _heat(axis: Axes, panel: Heat, picture: Picture) -> None:
    """Colours, numbers where they fit, hatching where there is no layer, and the scale of colours below."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba

    shades = [
        [cell and colours.shade(cell.value, panel.low, panel.high, panel.scale) for cell in row] for row in panel.cells
    ]
    across, down = ([place - 0.5 for place in range(n + 1)] for n in (len(picture.projections), picture.blocks))
    cells = [[to_rgba(shade or "none") for shade in row] for row in shades]
    # Rectangles, where `imshow` would put a bitmap into an SVG.
    axis.pcolormesh(across, down, cells, gid="cells", clip_on=False)
    axis.patch.set(facecolor=colours.EMPTY, edgecolor=colours.HATCH, hatch="//////")
    names = picture.projections
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
    for y, row in enumerate(panel.cells if picture.numbered else []):
        for x, cell in enumerate(row):
            if cell is not None:
                _number(axis, x, y, cell.text, cell.small, colours.ink_on(shades[y][x] or colours.PAPER))
    figure, ticks = axis.get_figure(root=True), [panel.low, (panel.low + panel.high) / 2, panel.high]
    assert figure is not None
    scale = ScalarMappable(Normalize(panel.low, panel.high), LinearSegmentedColormap.from_list("", panel.scale, STEPS))
    bar = figure.colorbar(scale, ax=axis, location="bottom", aspect=8 * _width(names), pad=0.02, ticks=ticks)
    assert bar.solids is not None
    bar.solids.set_gid("cells")
    bar.set_ticklabels([panel.tick(value) for value in ticks], fontsize=7)
    bar.set_label(panel.caption, fontsize=7)


def _number(axis: Axes, x: int, y: int, text: str, small: str, ink: str) -> None:
    axis.text(x, y - (0.17 if small else 0), text, fontsize=7, ha="center", va="center", color=ink)
    if small:
        axis.text(x, y + 0.25, small, fontsize=5, ha="center", va="center", color=ink)


def _dots(axis: Axes, panel: Dots) -> None:
    """The mean of each block as a dot; a line from the smallest to the largest of its layers."""
    if panel.log:
        axis.set_xscale("log")
    axis.set_xlim(panel.low, panel.high)
    axis.set_xticks(panel.ticks, [brief(round(tick, 12)) for tick in panel.ticks], fontsize=7)
    axis.set_facecolor("none")
    for y, row in enumerate(panel.rows):
        if row is not None:
            axis.plot([row.low, row.high], [y, y], color=colours.ACCENT, linewidth=1, alpha=0.6)
    points = [(row.mean, y) for y, row in enumerate(panel.rows) if row is not None]
    axis.plot(*zip(*points, strict=True), "o", color=colours.ACCENT, markersize=3.5)
    axis.grid(axis="x", color=colours.EMPTY)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(panel.caption, fontsize=7)
    axis.spines[["top", "right", "left"]].set_visible(False)
