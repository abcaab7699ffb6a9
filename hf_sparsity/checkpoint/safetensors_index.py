"""The index of a checkpoint's safetensors files: which tensor is where, read without loading any."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .bitmask import codec

# The names of dtypes in safetensors headers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The dtypes of weights: what "auto" may choose.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Stored(NamedTuple):
    """The place of a tensor: bytes `start` to `end` of a safetensors file.

    `dtype` (as safetensors names it) and `shape` are those of the tensor; of a `packed` one, those once unpacked.
    """

    file: str
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    packed: bool = False


def find_files(source: str | os.PathLike[str], config: Any, location: Mapping[str, Any]) -> list[str]:
    """Returns the safetensors files of a checkpoint, fetched from the Hub if need be.

    Raises:
        ValueError: there are none, or the config names a file that is none.
    """
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
    """Returns name -> place of all tensors in safetensors files.

    Raises:
        ValueError: a file is missing, cut short, or not safetensors.
    """
    stored: dict[str, Stored] = {}
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
        stored |= tensors
    return stored


@contextmanager
def opened(stored: Mapping[str, Stored], keys: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields name -> slice of the tensors of open files, in the order of `keys`.

    Slices are read when they are used; packed tensors are read and unpacked at once.
    """
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
    """Returns a packed tensor as a matrix. Raises ValueError with its name when it is damaged."""
    try:
        return codec.unpack(file.get_tensor(key))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
