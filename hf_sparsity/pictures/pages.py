"""Pictures as one HTML page: inline SVG, no script, nothing loaded from elsewhere, light or dark as the reader's system.

Names come from checkpoints: the templates escape all of them, and the page forbids scripts and references for itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import write_whole
from .canvas import check_matplotlib
from .heatmaps import draw_for_page
from .panels import Picture

TEMPLATES = Path(__file__).parent / "templates"


def draw_html(picture: Picture, file: str | os.PathLike[str]) -> Path:
    """Writes a page with all panels and, closed until asked for, the exact number of every cell. Returns `file`.

    Raises ValueError without matplotlib.
    """
    return write_page(page(picture), file)


def write_page(text: str, file: str | os.PathLike[str]) -> Path:
    """Writes a page whole or not at all, broken characters as "?". Returns `file`."""
    return write_whole(file, text.encode("utf-8", errors="replace"))


def page(picture: Picture) -> str:
    """Returns the page as text."""
    check_matplotlib()
    title = f"Sparsity of {picture.title}"
    return render("picture.html", title=title, picture=picture, drawing=draw_for_page(picture))


def render(template: str, **values: Any) -> str:
    """Returns a template of `templates/` with these values filled in, each escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "decimals": "{:.4f}".format}
    return environment.get_template(template).render(values)
