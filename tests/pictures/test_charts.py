"""Intervals and curves stand where their numbers are."""

from __future__ import annotations

import pytest

from hf_sparsity.pictures import charts, colours
from hf_sparsity.records import Interval


def test_an_interval_stands_where_its_numbers_are():
    rows = {"good": Interval(0.2, 0.1, 0.3), "even": Interval(0.02, -0.1, 0.1), "bad": Interval(-0.2, -0.3, -0.1)}
    (axis,) = charts.intervals_figure(rows, "caption").axes
    bars = [line for line in axis.lines if line.get_linewidth() == 3]
    assert [list(bar.get_xdata()) for bar in bars] == [[0.1, 0.3], [-0.1, 0.1], [-0.3, -0.1]]
    assert [bar.get_color() for bar in bars] == [colours.ACCENT, colours.QUIET, colours.WORSE]
    assert [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"] == [[0.2], [0.02], [-0.2]]
    assert [label.get_text() for label in axis.get_yticklabels()] == list(rows)
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first row is on top"


def test_what_is_off_the_scale_is_an_arrow():
    rows = {f"{i}": Interval(0.2, 0.1, 0.3) for i in range(charts.SCALED)}
    rows |= {"far": Interval(-4, -5, -3), "wide": Interval(0.1, -4, 0.2)}
    (axis,) = charts.intervals_figure(rows, "caption").axes
    arrows = [(line.get_marker(), line.get_ydata()[0]) for line in axis.lines if line.get_marker() in ("<", ">")]
    assert arrows == [("<", charts.SCALED), ("<", charts.SCALED + 1)]
    assert min(x for line in axis.lines for x in line.get_xdata()) >= -0.1, "nothing else is drawn there"


def test_a_scale_has_room_on_both_sides_of_zero():
    assert charts.scale_of([Interval(0.1, 0.05, 0.3), Interval(0.02, -0.1, 0.1)]) == pytest.approx((-0.1, 0.3))
    assert charts.scale_of([Interval(0.2, 0.1, 0.3)]) == pytest.approx((-0.1, 0.3))
    assert charts.scale_of([Interval(-2, -3, -1)])[1] == 1
    assert charts.scale_of([]) == charts.scale_of([Interval(0, 0, 0)]) == charts.scale_of([Interval(0)]) == (-1, 1)


def test_the_curve_goes_down_in_steps_to_its_end():
    points = [(10, 0.9), (20, 0.7), (40, 0.7)]
    curves = [charts.Curve("tokens", points), charts.Curve("seconds", points)]
    axes = charts.curves_figure(curves, {"uniform": 1.0, "owl": 0.99}, "KL").axes
    assert [axis.get_xlabel() for axis in axes] == ["tokens", "seconds"] and axes[0].get_xlim()[0] == 0
    (steps,) = [line for line in axes[1].lines if line.get_drawstyle() == "steps-post"]
    assert list(map(tuple, steps.get_xydata())) == points, "flat until the gain, then down"
    assert [line.get_label() for line in axes[0].lines[:2]] == ["uniform 1.0000", "owl 0.9900"]


def test_a_search_without_gain_is_drawn_too():
    assert "nan" not in charts.draw_curves([charts.Curve("x", [(0, 0.5)])], {}, "y").body.lower()
