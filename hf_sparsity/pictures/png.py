"""Pictures as PNG, with matplotlib: dark ink on opaque light paper, which reads on light and dark pages alike.

No ink has a contrast of 4.5 with both white and GitHub's dark #0d1117, so a transparent picture could not.
"""

from __future__ import annotations

import io
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from ..plan import Plan, Report
from . import colours
from .grid import make_grid
from .panels import Dots, Heat, Picture, bounds, clean, make_picture, sparsities

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

ROW, TALLEST = 0.28, 11.2  # inches: of a row, and of all rows together
COLUMN = 0.44
DPI = 150


def check_matplotlib() -> None:
    """`ValueError` when matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("a PNG needs matplotlib: pip install 'hf_sparsity[plot]' (an .html picture needs nothing)")


def draw_card(plan: Plan, report: Report | None, file: str | os.PathLike[str]) -> Path:
    """The picture of a model card: sparsity by block and projection, and the measure behind it. Returns `file`.

    `ValueError` without matplotlib, or when the report lacks a layer of the plan.
    """
    return draw_png(make_picture(make_grid(plan, report)), file)


def draw_png(picture: Picture, file: str | os.PathLike[str]) -> Path:
    """All panels side by side over the same blocks, under 16 inches tall; the same bytes each time. Returns `file`."""
    check_matplotlib()
    with _plain_style():
        widths = [2.0 if isinstance(panel, Dots) else _width(picture.projections) for panel in picture.panels]
        figure, axes = _figure(widths, 1, picture, notes=len(picture.notes))
        for panel, axis in zip(picture.panels, axes, strict=True):
            _dots(axis, panel) if isinstance(panel, Dots) else _heat(axis, panel, picture)
            axis.set_title(panel.title, fontsize=9, parse_math=False)
            for row in picture.breaks:
                axis.axhline(row - 0.5, color=colours.INK, linewidth=1.5)
        _rows(axes[0], picture)
        letters = int(17 * (sum(widths) + 0.8))  # of 7 points, on a line
        notes = [line for note in picture.notes for line in textwrap.wrap(note, letters, subsequent_indent="   ")]
        figure.suptitle(picture.title, fontsize=11, fontweight="bold", x=0.01, ha="left", parse_math=False)
        figure.supxlabel("\n".join(notes), fontsize=7, x=0.01, ha="left", parse_math=False, color=colours.QUIET)
        return write_whole(file, _bytes(figure))


def draw_plans(plans: Mapping[str, Plan], file: str | os.PathLike[str]) -> Path:
    """Several plans of one model, a panel each and four in a row, on one scale of colours. Returns `file`."""
    check_matplotlib()
    grids = {name: make_grid(plan) for name, plan in plans.items()}
    low, high = bounds([cell.shown for grid in grids.values() for row in grid.cells.values() for cell in row.values()])
    pictures = [make_picture(grid) for grid in grids.values()]
    columns = min(4, len(grids))
    with _plain_style():
        widths = [max(_width(picture.projections) for picture in pictures)] * columns
        longest = max(pictures, key=lambda picture: picture.blocks)
        figure, axes = _figure(widths, -(-len(grids) // columns), longest)
        for axis in axes[len(grids) :]:
            axis.set_visible(False)
        for axis, picture, (name, grid) in zip(axes, pictures, grids.items(), strict=False):
            image = _cells(axis, sparsities(clean(name), grid, low, high), picture)
            axis.set_title(clean(name), fontsize=9, parse_math=False)
            _rows(axis, picture)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, format=lambda value, _: f"{100 * value:.3g} %")
        bar.set_label("weights removed", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        return write_whole(file, _bytes(figure))


def _figure(widths: Sequence[float], rows: int, picture: Picture, *, notes: int = 0) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    names = 0.045 * max(map(len, picture.projections))  # inches that a slanted name hangs down
    height = rows * (min(ROW * picture.blocks, TALLEST / rows) + 1.5 + names) + 0.15 * notes
    figure = Figure(figsize=(sum(widths) + 1.0, height), layout="constrained", facecolor=colours.PAPER)
    axes = figure.subplots(rows, len(widths), squeeze=False, sharey=rows == 1, width_ratios=widths)
    return figure, list(axes.flat)


def _width(projections: Sequence[str]) -> float:
    return max(COLUMN * len(projections), 1.6)


def _heat(axis: Axes, panel: Heat, picture: Picture) -> None:
    image = _cells(axis, panel, picture)
    figure = axis.get_figure(root=True)
    assert figure is not None
    ticks = [panel.low, (panel.low + panel.high) / 2, panel.high]
    bar = figure.colorbar(
        image, ax=axis, location="bottom", aspect=8 * _width(picture.projections), pad=0.02, ticks=ticks
    )
    bar.set_ticklabels([panel.tick(value) for value in ticks], fontsize=7)
    bar.set_label(panel.caption, fontsize=7)


def _cells(axis: Axes, panel: Heat, picture: Picture) -> ScalarMappable:
    """Colours, numbers where they fit, hatching where there is no layer; returns what a colour bar needs."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba

    shades = [
        [cell and colours.shade(cell[0], panel.low, panel.high, panel.scale) for cell in row] for row in panel.cells
    ]
    axis.imshow([[to_rgba(shade or "none") for shade in row] for row in shades], aspect="auto", interpolation="none")
    axis.patch.set(facecolor=colours.EMPTY, edgecolor=colours.HATCH, hatch="//////")
    axis.set_xticks(
        range(len(picture.projections)),
        picture.projections,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        fontsize=7,
        parse_math=False,
    )
    for y, row in enumerate(panel.cells if picture.numbered else []):
        for x, cell in enumerate(row):
            if cell is not None:
                _number(axis, x, y, cell[1], cell[2], colours.ink_on(shades[y][x] or colours.PAPER))
    return ScalarMappable(Normalize(panel.low, panel.high), LinearSegmentedColormap.from_list("", panel.scale))


def _number(axis: Axes, x: int, y: int, text: str, small: str, ink: str) -> None:
    axis.text(x, y - (0.17 if small else 0), text, fontsize=7, ha="center", va="center", color=ink)
    if small:
        axis.text(x, y + 0.25, small, fontsize=5, ha="center", va="center", color=ink)


def _dots(axis: Axes, panel: Dots) -> None:
    """The mean of each block as a dot; a line from the smallest to the largest of its layers."""
    if panel.log:
        axis.set_xscale("log")
    axis.set_xlim(panel.low, panel.high)
    axis.set_facecolor(colours.PAPER)
    for y, row in enumerate(panel.rows):
        if row is not None:
            axis.plot([row[0], row[2]], [y, y], color=colours.ACCENT, linewidth=1, alpha=0.6)
    known = [(row[1], y) for y, row in enumerate(panel.rows) if row is not None]
    axis.plot(*zip(*known, strict=True), "o", color=colours.ACCENT, markersize=3.5)
    axis.grid(axis="x", color=colours.EMPTY)
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(panel.caption, fontsize=7, parse_math=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _rows(axis: Axes, picture: Picture) -> None:
    rows, labels = zip(*picture.ticks, strict=True)
    axis.set_yticks(rows, labels, fontsize=7, parse_math=False)
    axis.set_ylabel("block", fontsize=8)


def _bytes(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


@contextmanager
def _plain_style() -> Iterator[None]:
    """matplotlib's defaults in our ink, whatever the user has set; a name in letters it lacks is no warning."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
            matplotlib.rcParams[key] = colours.INK
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield
