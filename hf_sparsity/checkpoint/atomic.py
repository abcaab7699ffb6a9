"""Model folders and weight files that are whole or not there, and what a failed or interrupted write says."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing


def check_place(path: Path) -> None:
    """Raises ValueError for a path inside something that is a file."""
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"output {str(path)!r} cannot be made, since {str(above)!r} is a file; choose another")


def check_output(folder: str | os.PathLike[str]) -> Path:
    """Returns the folder as a path. Raises ValueError when it exists and holds anything, or cannot be made."""
    path = Path(folder)
    check_place(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {str(path)!r} exists and is not an empty folder; choose another, or remove it")
    return path


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `output`, which takes its name when the block ends, and vanishes if it fails.

    Raises:
        ValueError: `output` exists and holds anything.
    """
    path = check_output(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that gets its name when it is safely on disk.

    Raises:
        WriteError: the disk is full, or the file cannot be written.
    """
    with uninterrupted(), disk_errors(path.parent), replacing(path, durable=True) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata or {}))


class WriteError(OSError):
    """A failed write; what was finished before it is safe."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns the error of a failed write into a `WriteError` that says what is safe and what to do."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 2**30 if folder.exists() else 0
        raise WriteError(
            f"writing to {folder} failed ({error}; {free:.2f} GiB free). What is finished is safe: "
            "make room, and start the same command again to go on"
        ) from error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Makes Ctrl-C, and a SIGTERM that has a handler, wait until a write is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, Any]] = []
    current = ((number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM))
    handlers: dict[int, Callable[[int, Any], Any]] = {
        number: handler for number, handler in current if callable(handler)
    }
    for number in handlers:
        signal.signal(number, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in received[:1]:
            handlers[number](number, frame)
