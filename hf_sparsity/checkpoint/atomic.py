"""Files that are whole or not there: temporary names, renames, and what a failed or interrupted write says."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def check_output(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path; `ValueError` when it exists and holds anything."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {str(path)!r} exists and is not an empty folder; choose another, or remove it")
    return path


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name at the end, or vanishes; `ValueError` as `check_output`."""
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
    """A safetensors file that gets its name when it is safely on disk.

    Until then it is in a folder of its own, since safetensors writes beside its goal under a name of chance: what a
    killed run left there goes when the file is written again.
    """
    place = path.with_name(f".{path.name}.partial")
    with uninterrupted(), disk_errors(path.parent):
        shutil.rmtree(place, ignore_errors=True)
        try:
            place.mkdir()
            temporary = place / path.name
            save_file(dict(tensors), temporary, metadata=dict(metadata or {}))
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
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


class WriteError(OSError):
    """A write failed; what was finished before is safe."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A failed write as a `WriteError` that says what is safe and what to do."""
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
    """Lets Ctrl-C, and a SIGTERM that somebody handles, wait until a write is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, Any]] = []
    found = ((number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM))
    handlers: dict[int, Callable[[int, Any], Any]] = {number: one for number, one in found if callable(one)}
    for number in handlers:
        signal.signal(number, lambda *given: pressed.append(given))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in pressed[:1]:
            handlers[number](number, frame)
