"""Intervals as small pictures, one a row of a table, all on one scale with a line at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..records import Interval
from .panels import brief, round_ticks

WIDTH, HEIGHT, EDGE = 150, 18, 9  # pixels; what the ends of the scale keep from the edges

STYLE = """
svg.interval { display: block; min-width: 150px }
svg .zero { stroke: var(--ink); stroke-dasharray: 2 2 }
.better line.bar { stroke: var(--accent) } .better .value { fill: var(--accent) }
.worse line.bar { stroke: var(--worse) } .worse .value { fill: var(--worse) }
.even line.bar { stroke: var(--quiet) } .even .value { fill: var(--quiet) }
svg line.bar { stroke-width: 3 }
"""


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, with zero in between; what lies outside is drawn as an arrow at the edge."""

    low: float
    high: float

    @classmethod
    def of(cls, intervals: Sequence[Interval]) -> Scale:
        """Wide enough for all of these and zero, with at least a third as much room on its other side."""
        ends = [end for one in intervals for end in (one.low, one.high) if end is not None]
        low, high = min([0.0, *ends]), max([0.0, *ends])
        return cls(min(low, -high / 3), max(high, -low / 3)) if low < high else cls(-1.0, 1.0)

    def place(self, value: float) -> float:
        """Pixels from the left; outside of the scale, its end."""
        share = (value - self.low) / (self.high - self.low)
        return EDGE + min(max(share, 0.0), 1.0) * (WIDTH - 2 * EDGE)


def judgement(interval: Interval) -> str:
    """`better` or `worse` than zero, where above is better; `even` where zero is within."""
    return {True: "better", False: "worse", None: "even"}[interval.is_above_zero]


def draw_interval(interval: Interval, scale: Scale, words: str) -> str:
    """The value as a dot on a bar from low to high; `words` say the same."""
    value = interval.value
    low, high = (value if end is None else end for end in (interval.low, interval.high))
    left, middle, right = (scale.place(x) for x in (low, value, high))
    arrows = _arrow(left, -1) * (low < scale.low) + _arrow(right, 1) * (high > scale.high)
    dot = f'<circle class="value" cx="{middle:.1f}" cy="9" r="4"/>' if scale.low <= value <= scale.high else ""
    body = f'<line class="bar" x1="{left:.1f}" x2="{right:.1f}" y1="9" y2="9"/>{dot}{arrows}'
    return _svg(f'<g class="{judgement(interval)}"><title>{escape(words)}</title>{body}</g>', scale, words)


def draw_axis(scale: Scale, words: str) -> str:
    """The numbers of the scale, for the head of the column."""
    room = 4 + 6.5 * max(len(_number(value)) for value in round_ticks(scale.low, scale.high))
    shown: list[float] = []
    for value in sorted(round_ticks(scale.low, scale.high), key=abs):  # zero first
        if all(abs(scale.place(value) - scale.place(one)) >= room for one in shown):
            shown.append(value)
    return _svg("".join(_label(value, scale) for value in shown), scale, words)


def _label(value: float, scale: Scale) -> str:
    return f'<text text-anchor="middle" x="{scale.place(value):.1f}" y="13">{_number(value)}</text>'


def _number(value: float) -> str:
    return brief(round(value, 12) + 0.0)


def _arrow(x: float, way: int) -> str:
    return f'<path class="value" d="M{x + 7 * way:.1f} 9l{-7 * way} -5v10z"/>'


def _svg(body: str, scale: Scale, words: str) -> str:
    zero = f'<line class="zero" x1="{scale.place(0):.1f}" x2="{scale.place(0):.1f}" y1="0" y2="{HEIGHT}"/>'
    zero = "" if "<text" in body else zero
    return (
        f'<svg class="interval" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(words)}">{zero}{body}</svg>'
    )
