"""Picture files: which can be written, and where."""

from __future__ import annotations

import os
from pathlib import Path

from .canvas import check_matplotlib

SUFFIXES = (".png", ".html")


def check_picture(file: str | os.PathLike[str]) -> Path:
    """Returns the file as a path, before the work; an existing picture will be replaced.

    Raises ValueError or FileNotFoundError when no picture can be written there or drawn at all.
    """
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the picture {str(path)!r} must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"the picture {str(path)!r} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} of the picture does not exist; make it first")
    check_matplotlib()
    return path


def check_page(file: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Returns the file of a report page as a path, before the work; an existing one is only replaced with `overwrite`.

    Raises ValueError or FileNotFoundError when no page can be written there or drawn at all.
    """
    path = Path(file)
    if path.suffix.lower() != ".html":
        raise ValueError(f"the report {str(path)!r} is a page; its name must end in .html")
    if path.is_dir():
        raise ValueError(f"the report {str(path)!r} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"report {str(path)!r} exists; choose another name, or remove it (--overwrite)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} of the report does not exist; make it first")
    check_matplotlib()
    return path
