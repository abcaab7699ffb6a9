"""Files, whole or not at all; and JSON that may come from strangers. Standard library only."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

MARKER = "UNFINISHED"

LARGEST_FILE = 64 * 2**20  # bytes of a JSON file; a plan of 100,000 layers has 15 MB


def write_whole(file: str | os.PathLike[str], data: bytes) -> Path:
    """Writes to a temporary file beside it, then renames: the file is whole or not there. Returns its path."""
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


def write_json(file: str | os.PathLike[str], data: Any) -> None:
    """Writes JSON, whole or not at all; makes the folder. `ValueError` for NaN and infinity."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode("utf-8"))


def read_json(file: str | os.PathLike[str]) -> Any:
    """Reads a JSON file of at most `LARGEST_FILE` bytes; `ValueError` when it is truncated or not JSON.

    `FileNotFoundError` says whether the file or its folder is missing.
    """
    path = Path(file)
    if not path.exists():
        missing = f"{path.parent} has no {path.name}" if path.parent.is_dir() else f"{path.parent} is not a folder"
        raise FileNotFoundError(f"{missing}; give the folder of a sparse model, or a file that is there")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path} has {size} bytes; a plan, report or config of more than {LARGEST_FILE} is refused")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from None


def check_finished(folder: str | os.PathLike[str]) -> None:
    """`ValueError` for a folder whose run was interrupted."""
    if (Path(folder) / MARKER).is_dir():
        raise ValueError(
            f"{folder} is unfinished: its run was interrupted. Start the same command again to complete it"
        )
