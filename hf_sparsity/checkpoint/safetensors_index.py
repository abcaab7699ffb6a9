"""Where tensors are stored: the safetensors files of a checkpoint, read without loading them."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .bitmask import codec


class Stored(NamedTuple):
    """The place of a tensor: bytes `start` to `end` of a safetensors file, and what they are, or once `packed` were."""

    file: str
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    packed: bool = False


def find_files(source: str | os.PathLike[str], config: Any, location: Mapping[str, Any]) -> list[str]:
    """The safetensors files of a checkpoint, fetched from the Hub if need be."""
    named = getattr(config, "transformers_weights", None)
    if named is not None and (os.path.basename(named) != named or not named.endswith((".safetensors", ".json"))):
        raise ValueError(f"transformers_weights={named!r} in the config is not the name of a safetensors file")
    for name in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **location)
        if file is not None:
            return get_checkpoint_shard_files(source, file, **location)[0] if name.endswith(".json") else [file]
    raise ValueError(
        f"{str(source)!r} has no {named or SAFE_WEIGHTS_NAME}: only safetensors can be read block by block. "
        "Load the model once with transformers and save it with save_pretrained"
    )


def read_headers(files: Iterable[str]) -> dict[str, Stored]:
    """Name -> place of all tensors in safetensors files.

    Raises:
        ValueError: a file is missing, cut short, or not safetensors.
    """
    found: dict[str, Stored] = {}
    for file in sorted(files):
        try:
            size = os.path.getsize(file)
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if length <= size else {}
            header.pop("__metadata__", None)
            begin = 8 + length
            tensors = {
                name: Stored(
                    file, begin + t["data_offsets"][0], begin + t["data_offsets"][1], t["dtype"], tuple(t["shape"])
                )
                for name, t in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
        if max((tensor.end for tensor in tensors.values()), default=begin) != size:
            raise ValueError(f"{file} has {size} bytes, not what its header says: was its download or copy cut short?")
        found |= tensors
    return found


@contextmanager
def opened(stored: Mapping[str, Stored], keys: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Name -> slice of the tensors in open files, in this order; only packed ones are read already, and unpacked."""
    # A private mapping reserves memory for the whole file on Windows; transformers reads without one there too.
    options = {"backend": "pread"} if sys.platform == "win32" else {}
    files: dict[str, Any] = {}
    try:
        tensors = {}
        for key in keys:
            file = stored[key].file
            if file not in files:
                files[file] = safe_open(file, framework="pt", **options)
            tensors[key] = _unpacked(files[file], key) if stored[key].packed else files[file].get_slice(key)
        yield tensors
    finally:
        for handle in files.values():
            handle.__exit__(None, None, None)


def _unpacked(file: Any, key: str) -> Tensor:
    """A packed tensor as a matrix; `ValueError` names it when it is damaged."""
    try:
        return codec.unpack(file.get_tensor(key))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def prefetch(ranges: Iterable[tuple[Any, ...]]) -> None:
    """Reads bytes into the system's file cache, in this order, and returns at once: `(file, start, end, ...)` or `Stored`.

    The system sends them to nowhere, one call a stretch, so that neither memory nor Python's lock is taken. Does nothing
    where it cannot.
    """
    if hasattr(os, "sendfile"):
        threading.Thread(target=_read, args=(list(ranges),), daemon=True).start()


def _read(ranges: Iterable[tuple[Any, ...]]) -> None:
    merged: list[list[Any]] = []
    for file, start, end, *_ in ranges:
        if merged and merged[-1][0] == file and merged[-1][2] == start:
            merged[-1][2] = end
        else:
            merged.append([file, start, end])
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # whoever needs the bytes says what is wrong with them
        for file, start, end in merged:
            with open(file, "rb", buffering=0) as stream:
                while start < end and (sent := os.sendfile(nowhere.fileno(), stream.fileno(), start, end - start)):
                    start += sent
