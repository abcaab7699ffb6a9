"""What all drawings share: matplotlib in our ink, and a figure as the bytes of a PNG or as an SVG inside a page.

A PNG is dark ink on opaque light paper, which reads on light and dark pages alike: no ink has a contrast of 4.5 with both
white and GitHub's dark #0d1117. An SVG has no paper, and takes its ink from the page around it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from . import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150  # of a PNG
_IDS = re.compile(r'<g id="(?!cells)[^"]*"')  # matplotlib numbers its groups; nothing refers to them
_PATHS = re.compile(r' d="[^"]*"')
_SIZE = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')


@dataclass(frozen=True)
class Drawing:
    """An SVG for a page: `title` in plain text, `width` and `height` in points, `body` is what is inside `<svg>`."""

    title: str
    width: float
    height: float
    body: str


def check_matplotlib() -> None:
    """Raises ValueError when matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("a picture needs matplotlib: pip install 'hf_sparsity[plot]'")


@contextmanager
def plain_style() -> Iterator[None]:
    """matplotlib's defaults in our ink, whatever the user has set; every text is taken literally, never as a formula."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
            matplotlib.rcParams[name] = colours.INK
        matplotlib.rcParams["text.parse_math"] = False
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks
        yield


def as_png(figure: Figure) -> bytes:
    """Returns the figure on opaque paper; the same bytes each time."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def as_drawing(figure: Figure, title: str) -> Drawing:
    """Returns the figure as an SVG without paper, its ink named by the page's variables; the same text each time.

    `title` also tells the names of its parts from those of other drawings on the page.
    """
    import matplotlib

    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title.encode(errors="replace").decode()}):
        figure.savefig(stream, format="svg", facecolor="none", metadata=nothing)
    head, _, body = stream.getvalue().partition("<svg")[2].partition(">")
    size = _SIZE.search(head)
    assert size is not None, "matplotlib says how large an SVG is"
    body = _IDS.sub("<g", body.rpartition("</svg>")[0]).replace('id="cells"', 'class="cells"')
    body = _PATHS.sub(lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)  # a hundredth of a point is enough
    for colour, variable in colours.THEMED.items():
        body = body.replace(colour, f"var(--{variable})")
    return Drawing(title, float(size[1]), float(size[2]), body)
