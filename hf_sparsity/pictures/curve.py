"""A search over time: the best so far as steps that go down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from .html import figure
from .panels import brief, clean, round_ticks

WIDTH, HEIGHT = 460, 250  # pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 46  # of the frame

STYLE = """
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2 }
svg .line { stroke: var(--quiet); stroke-dasharray: 5 4 }
svg .said { fill: var(--quiet); paint-order: stroke; stroke: var(--paper); stroke-width: 4 }
"""


def draw_curve(
    title: str,
    points: Sequence[tuple[float, float, str]],
    *,
    across: str,
    up: str,
    show: Callable[[float], str],
    lines: Mapping[str, float],
) -> str:
    """Steps through `points` (x, y, tooltip), whose last is the end; level `lines`, name -> y, to compare with.

    `across` and `up` name the axes; `show` writes a number of the lower one, which begins at zero.
    """
    values = [*(y for _, y, _ in points), *lines.values()]
    edge = 0.08 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    low, high, end = min(values) - edge, max(values) + edge, max(x for x, _, _ in points) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + x / end * (WIDTH - LEFT - RIGHT)
        return round(right, 1), round(TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    body = [*_axes(at, low, high, end, show), *_levels(at, end, lines)]
    steps = "".join(f"H{at(x, y)[0]}V{at(x, y)[1]}" for x, y, _ in points[1:])
    body.append(f'<path class="curve" d="M{at(*points[0][:2])[0]} {at(*points[0][:2])[1]}{steps}"/>')
    for x, y, tip in points:
        body.append(
            f'<circle class="dot" cx="{at(x, y)[0]}" cy="{at(x, y)[1]}" r="3"><title>{escape(tip)}</title></circle>'
        )
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    body.append(f'<text text-anchor="middle" x="{middle}" y="{HEIGHT - 10}">{escape(across)}</text>')
    return figure(f"{title}\n{up}", "\n".join(body), WIDTH, HEIGHT)


At = Callable[[float, float], tuple[float, float]]


def _axes(at: At, low: float, high: float, end: float, show: Callable[[float], str]) -> list[str]:
    found = []
    for value in round_ticks(low, high):
        y = at(0, value)[1]
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        found.append(f'<text text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{brief(round(value, 12), 4)}</text>')
    for value in round_ticks(0, end):
        x = at(value, low)[0]
        found.append(f'<text text-anchor="middle" x="{x}" y="{HEIGHT - BOTTOM + 16}">{escape(show(value))}</text>')
    y = HEIGHT - BOTTOM
    return [*found, f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']


def _levels(at: At, end: float, lines: Mapping[str, float]) -> list[str]:
    """The highest first; a name stands above its line, or below where the line above is near."""
    found: list[str] = []
    before = -1e9
    for name, value in sorted(lines.items(), key=lambda one: -one[1]):
        x, y = at(end, value)
        found.append(f'<line class="line" x1="{LEFT}" x2="{x}" y1="{y}" y2="{y}"/>')
        below = y - before < 16 or y < TOP + 12
        text = escape(f"{clean(name, 44)} {value:.4f}")
        found.append(f'<text class="said" text-anchor="end" x="{x}" y="{y + (13 if below else -4):.1f}">{text}</text>')
        before = y + 13 * below
    return found
