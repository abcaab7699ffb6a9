"""Pictures as one HTML page: inline SVG, no script, nothing loaded from elsewhere, light or dark as the reader's system.

Names come from checkpoints, so everything is escaped; the page also forbids scripts and references for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path

from ..files import write_whole
from . import colours
from .panels import Dots, Heat, Picture, brief

CELL, NARROW = 40, 20  # pixels: width of a cell with and without a number
TOP, LETTER, DOTS = 8, 6.3, 230  # pixels: room above the blocks, width of a letter, of a panel of dots

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --paper: #ffffff; --empty: #e3e7eb; --hatch: #b3bcc5;
  --accent: #0f5f9e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --paper: #0d1117; --empty: #21262d;
  --hatch: #484f58; --accent: #6cb6ff } }
body { background: var(--paper); color: var(--ink); font: 14px/1.5 system-ui, sans-serif; margin: 1.5rem }
h1 { font-size: 1.25rem; overflow-wrap: anywhere }
ul { color: var(--quiet); padding-left: 1.2rem; overflow-wrap: anywhere }
.panels { display: flex; flex-wrap: wrap; gap: 1.5rem 1rem }
figure { margin: 0; overflow-x: auto; display: flex; flex-direction: column }
figcaption { flex: 1; font-weight: 600; overflow-wrap: anywhere }
figcaption small { display: block; font-weight: 400; color: var(--quiet) }
svg { max-width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink) }
svg .small { font-size: 8.5px }
svg rect { shape-rendering: crispEdges }
.defs { position: absolute }
svg .axis { stroke: var(--ink); stroke-width: 1.5 }
svg .grid { stroke: var(--empty) }
svg .span { stroke: var(--accent); stroke-width: 1.5; opacity: .6 }
svg .dot { fill: var(--accent) }
svg .empty { fill: url(#none) }
svg .number { pointer-events: none; text-anchor: middle }
svg rect.cell:hover, svg .dot:hover { stroke: var(--ink); stroke-width: 2 }
table { border-collapse: collapse; margin-top: .5rem }
td, th { padding: 0 .8rem .1rem 0; text-align: left }
@media (max-width: 600px) { body { margin: .8rem } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def draw_html(picture: Picture, file: str | os.PathLike[str]) -> Path:
    """The page with all panels; every cell says its exact numbers when pointed at, and in a table. Returns `file`."""
    return write_whole(file, page(picture).encode("utf-8"))


def page(picture: Picture) -> str:
    """The page as text."""
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in picture.notes)
    title = f"Sparsity of {picture.title}"
    return document(title, f"<h1>{escape(title)}</h1>\n{drawn(picture)}\n<ul>\n{notes}</ul>\n{tables(picture)}")


def document(title: str, body: str, style: str = "") -> str:
    """A page around a body of HTML. `title` is plain text; `style` is added to ours."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<svg class="defs" width="0" height="0" aria-hidden="true"><defs><pattern id="none" width="6" height="6" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)"><rect width="6" height="6" fill="var(--empty)"/><rect width="2" height="6"
 fill="var(--hatch)"/></pattern></defs></svg>
{body}</body>
</html>
"""


def drawn(picture: Picture) -> str:
    """All panels of a picture, as many in a row as there is room for."""
    return f'<div class="panels">\n{"".join(_panel(panel, picture) for panel in picture.panels)}</div>'


def tables(picture: Picture) -> str:
    """All numbers of a picture in words, closed until asked for."""
    return "".join(_table(panel) for panel in picture.panels)


def figure(title: str, body: str, width: float, height: float) -> str:
    """An SVG of this size under its title; further lines of the title are smaller. Shrinks a little where it has to."""
    name, *more = title.split("\n")
    small = "".join(f"<small>{escape(line)}</small>" for line in more)
    return (
        f'<figure style="max-width:min(100%,{width:.0f}px)"><figcaption>{escape(name)}{small}</figcaption>'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" style="min-width:{0.8 * width:.0f}px" role="img" '
        f'aria-label="{escape(title)}">\n{body}\n</svg></figure>\n'
    )


def _panel(panel: Heat | Dots, picture: Picture) -> str:
    row = 24 if picture.numbered else max(8, min(14, 800 // picture.blocks))
    left = round(28 + LETTER * max(len(label) for _, label in picture.ticks))
    bottom = TOP + row * picture.blocks
    longest = round(LETTER * 0.75 * max(map(len, picture.projections)))
    # All of one height, so that blocks stand beside each other.
    height = bottom + (longest + 75 if any(isinstance(one, Heat) for one in picture.panels) else 45)
    if isinstance(panel, Dots):
        width = left + DOTS + 20
        body = _dots(panel, left, row, bottom)
    else:
        cell = CELL if picture.numbered else NARROW
        left = max(left, longest - cell // 2)
        width = left + max(cell * len(picture.projections), 3 * CELL) + 20
        body = _heat(panel, picture, (left, row, bottom, bottom + longest + 25), cell)
    return figure(panel.title, "\n".join([*body, *_rows(picture, left, row, width - 20)]), width, height)


def _heat(panel: Heat, picture: Picture, place: tuple[int, int, int, int], width: int) -> Iterator[str]:
    left, row, bottom, bar = place
    for y, cells in enumerate(panel.cells):
        for x, cell in enumerate(cells):
            at = f'x="{left + width * x:.1f}" y="{TOP + row * y}" width="{width}" height="{row}"'
            if cell is None:
                yield f'<rect class="empty" {at}><title>{panel.empty}</title></rect>'
                continue
            value, text, small, tip = cell
            shade = colours.shade(value, panel.low, panel.high, panel.scale)
            yield f'<rect class="cell" fill="{shade}" {at}><title>{escape(tip)}</title></rect>'
            if picture.numbered:
                middle, ink = left + width * (x + 0.5), colours.ink_on(shade)
                yield _number(text, middle, TOP + row * y + (12 if small else 16), ink)
                if small:
                    yield _number(small, middle, TOP + row * y + 21, ink, "number small")
    for x, projection in enumerate(picture.projections):
        at = f"{left + width * (x + 0.5) + 4:.1f},{bottom + 12}"
        yield f'<text text-anchor="end" transform="translate({at}) rotate(-45)">{escape(projection)}</text>'
    yield from _bar(panel, left, bar, max(width * len(picture.projections), 3 * CELL))


def _number(text: str, x: float, y: float, ink: str, kind: str = "number") -> str:
    return f'<text class="{kind}" style="fill:{ink}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _bar(panel: Heat, left: float, top: float, width: float) -> Iterator[str]:
    """The scale of colours in small steps, with its ends and middle in words."""
    steps = 60
    for step in range(steps):
        shade = colours.shade((step + 0.5) / steps, 0, 1, panel.scale)
        x = left + width * step / steps
        yield f'<rect fill="{shade}" x="{x:.1f}" y="{top:.0f}" width="{width / steps + 0.5:.2f}" height="10"/>'
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        text = panel.tick(panel.low + share * (panel.high - panel.low))
        yield f'<text text-anchor="{anchor}" x="{left + share * width:.1f}" y="{top + 23:.0f}">{escape(text)}</text>'
    yield f'<text text-anchor="middle" x="{left + width / 2:.1f}" y="{top + 38:.0f}">{escape(panel.caption)}</text>'


def _dots(panel: Dots, left: float, row: int, bottom: int) -> Iterator[str]:
    """The mean of each block as a dot; a line from the smallest to the largest of its layers."""

    def x(value: float) -> str:
        return f"{left + 5 + (DOTS - 10) * panel.place(value):.1f}"

    for value in panel.ticks:
        yield f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text text-anchor="middle" x="{x(value)}" y="{bottom + 15}">{brief(value)}</text>'
    for y, found in enumerate(panel.rows):
        if found is not None:
            low, mean, high, tip = found
            at = TOP + row * (y + 0.5)
            yield f'<line class="span" x1="{x(low)}" x2="{x(high)}" y1="{at}" y2="{at}"/>'
            yield f'<circle class="dot" cx="{x(mean)}" cy="{at}" r="3.5"><title>{escape(tip)}</title></circle>'
    yield f'<line class="axis" x1="{left}" x2="{left + DOTS}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text text-anchor="middle" x="{left + DOTS / 2}" y="{bottom + 32}">{escape(panel.caption)}</text>'


def _rows(picture: Picture, left: float, row: int, right: float) -> Iterator[str]:
    for y, label in picture.ticks:
        yield f'<text text-anchor="end" x="{left - 6:.1f}" y="{TOP + row * (y + 0.5) + 4:.1f}">{escape(label)}</text>'
    for y in picture.breaks:
        yield f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{TOP + row * y}" y2="{TOP + row * y}"/>'


def _table(panel: Heat | Dots) -> str:
    rows = [panel.rows] if isinstance(panel, Dots) else panel.cells
    tips = "".join(f"<tr><td>{escape(cell[3])}</td></tr>\n" for row in rows for cell in row if cell is not None)
    title = escape(panel.title.replace("\n", ": "))
    return f"<details><summary>{title}: all numbers</summary>\n<table>\n{tips}</table></details>\n"
