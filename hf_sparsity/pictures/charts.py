"""Charts of a race as matplotlib figures: intervals below each other, and the best plan of a search as it improves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..records import Interval
from . import colours
from .canvas import Drawing, as_drawing, plain_style
from .panels import brief, clean, round_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALED = 10  # rows from the top whose intervals fit on the scale; what is far outside is an arrow
LONGEST = 60  # letters of a plan's name
JUDGED = {True: colours.ACCENT, False: colours.WORSE, None: colours.QUIET}  # by `Interval.is_above_zero`


class Curve(NamedTuple):
    """A panel of `draw_curves`: what its lower axis says, and the (x, y) of each gain and of the end."""

    caption: str
    points: Sequence[tuple[float, float]]


def draw_intervals(rows: Mapping[str, Interval], caption: str) -> Drawing:
    """Returns `intervals_figure` for a page."""
    with plain_style():
        return as_drawing(intervals_figure(rows, caption), caption)


def intervals_figure(rows: Mapping[str, Interval], caption: str) -> Figure:
    """Returns a row for each interval, the value as a dot on a bar, all on one scale with a line at zero.

    A bar is blue where its interval is above zero, orange where it is below, grey where zero is within.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.26 * len(rows) + 0.8), layout="constrained")
    axis = figure.subplots()
    low, high = scale_of(list(rows.values())[:SCALED])
    for place, interval in enumerate(rows.values()):
        _draw_interval(axis, place, interval, low, high)
    edge = 0.03 * (high - low)
    axis.set_xlim(low - edge, high + edge)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.axvline(0, color=colours.INK, linewidth=1, linestyle=(0, (2, 2)))
    axis.set_yticks(range(len(rows)), [clean(name, LONGEST) for name in rows], fontsize=8)
    ticks = round_ticks(low, high)
    axis.set_xticks(ticks, [brief(round(tick, 12) + 0.0) for tick in ticks], fontsize=8)
    axis.set_xlabel(caption, fontsize=8)
    axis.tick_params(axis="y", length=0)
    _clear(axis, grid="x")
    return figure


def scale_of(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Returns the ends of a scale for all of these and zero, with at least a third as much room on zero's other side."""
    ends = [0.0, *(end for interval in intervals for end in (interval.low, interval.high) if end is not None)]
    low, high = min(ends), max(ends)
    return (min(low, -high / 3), max(high, -low / 3)) if low < high else (-1.0, 1.0)


def _draw_interval(axis: Axes, place: int, interval: Interval, low: float, high: float) -> None:
    colour = JUDGED[interval.is_above_zero]
    left, right = (interval.value if end is None else end for end in (interval.low, interval.high))
    if left < high and right > low:
        axis.plot([max(left, low), min(right, high)], [place, place], color=colour, linewidth=3)
    if low <= interval.value <= high:
        axis.plot([interval.value], [place], "o", color=colour, markersize=6)
    if left < low:
        axis.plot([low], [place], "<", color=colour, markersize=7)
    if right > high:
        axis.plot([high], [place], ">", color=colour, markersize=7)


def draw_curves(curves: Sequence[Curve], levels: Mapping[str, float], caption: str) -> Drawing:
    """Returns `curves_figure` for a page."""
    with plain_style():
        return as_drawing(curves_figure(curves, levels, caption), caption)


def curves_figure(curves: Sequence[Curve], levels: Mapping[str, float], caption: str) -> Figure:
    """Returns steps that go down through the points of each curve, side by side on one scale.

    Args:
        curves: each begins at zero on its lower axis.
        levels: name -> y of what to compare with, at most two, drawn as level lines.
        caption: of the axis upwards.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(curves), 3.0), layout="constrained")
    axes = list(figure.subplots(1, len(curves), squeeze=False, sharey=True).flat)
    for axis, curve in zip(axes, curves, strict=True):
        across, up = zip(*curve.points, strict=True)
        for style, (name, level) in zip(("--", ":"), levels.items(), strict=False):
            label = f"{clean(name, LONGEST)} {level:.4f}"
            axis.axhline(level, color=colours.QUIET, linewidth=1.2, linestyle=style, label=label)
        axis.plot(across, up, color=colours.ACCENT, linewidth=2, drawstyle="steps-post")
        axis.plot(across, up, "o", color=colours.ACCENT, markersize=5)
        axis.set_xlim(0, 1.02 * max(across) or 1.0)
        axis.xaxis.set_major_formatter(_short)
        axis.set_xlabel(curve.caption, fontsize=8)
        axis.tick_params(labelsize=8)
        _clear(axis, grid="y")
    axes[0].set_ylabel(caption, fontsize=8)
    if levels:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", fontsize=8, frameon=False, ncols=len(labels))
    return figure


def _clear(axis: Axes, *, grid: str) -> None:
    axis.set_facecolor("none")
    axis.grid(axis=grid, color=colours.EMPTY)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _short(value: float, _: object) -> str:
    """A number of an axis with k, M or G for its thousands."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
