"""Files that are whole or not there, and JSON that may come from strangers. Standard library only."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MARKER = "UNFINISHED"  # the folder inside an output, or beside a plan's file, until it is complete
LARGEST_FILE = 64 * 2**20  # bytes of a JSON file; a plan of 100,000 layers has 15 MB


@contextmanager
def replacing(file: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Yields a path to write to; what is written there becomes `file` when the block ends, and vanishes if it fails.

    The path is in a folder of its own beside `file`, because some writers make further files beside their target.
    `durable`: the content is on the disk before it gets its name, so it survives a loss of power; the folder has a fixed
    name then, and what a killed process left in it is removed. For one writer at a time.
    """
    path = Path(file)
    if durable:
        place = path.with_name(f".{path.name}.partial")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    else:
        place = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary = place / path.name
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power, where the system can open folders."""
    with suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(file: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file so that it is whole or not there; returns its path."""
    with replacing(file) as temporary:
        temporary.write_bytes(data)
    return Path(file)


def write_json(file: str | os.PathLike[str], data: Any) -> None:
    """Writes JSON so that the file is whole or not there, and makes its folder. Raises ValueError for NaN and infinity."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode("utf-8"))


def read_json(file: str | os.PathLike[str]) -> Any:
    """Reads a JSON file of at most `LARGEST_FILE` bytes.

    Raises:
        FileNotFoundError: the file or its folder is missing; the message says which.
        ValueError: the file is too large, truncated or not JSON.
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
    """Raises ValueError for a folder whose run was interrupted."""
    if (Path(folder) / MARKER).is_dir():
        raise ValueError(
            f"{folder} is unfinished: its run was interrupted. Start the same command again to complete it"
        )


def is_inside(path: Path, folder: Path) -> bool:
    """Returns whether a file lies in a model's folder, or in the Hub's cache if that is where the folder is; links are followed."""
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder  # its files are links into blobs
    return path.resolve().is_relative_to(home.resolve())
