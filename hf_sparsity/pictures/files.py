"""Picture files: which can be written, and whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

SUFFIXES = (".png", ".html")


def check_picture(file: str | os.PathLike[str]) -> Path:
    """The file as a path; `ValueError` or `FileNotFoundError` when no picture can be written there.

    An existing picture is replaced. Call it before the work.
    """
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the picture {str(path)!r} must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"the picture {str(path)!r} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} of the picture does not exist; make it first")
    if path.suffix.lower() == ".png":
        from .png import check_matplotlib

        check_matplotlib()
    return path


def write_whole(file: str | os.PathLike[str], data: bytes) -> Path:
    """Writes to a temporary file beside it, then renames."""
    path = Path(file)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
