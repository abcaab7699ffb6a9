"""Finds the tensors of a checkpoint, dense or packed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..model.accepted import quantization_of, quantized_message
from .bitmask import codec
from .packed_folder import LAYOUT_ENTRIES, METHOD, check_description, check_headers, check_tensors, is_dense
from .safetensors_index import NAMES, Stored, find_files, read_headers


def find_stored(source: str | os.PathLike[str], config: Any, location: Mapping[str, Any]) -> dict[str, Stored]:
    """Returns name -> place of all tensors; packed ones have the dtype and shape that they have once unpacked.

    Args:
        source: a folder or Hub id.
        config: the model's config; the entries that describe the packed layout are removed from it.
        location: `revision`, `token`, `cache_dir`, ... as in transformers.

    Raises:
        ValueError: no safetensors, a file that is missing or damaged, or weights quantized by another method.
    """
    described = quantization_of(config)
    if described is None:
        return read_headers(find_files(source, config, location))
    if not isinstance(described, Mapping) or described.get("quant_method") != METHOD:
        raise ValueError(quantized_message(repr(str(source)), "read block by block"))
    checked = check_description(described)
    if is_dense(Path(source), checked):
        _forget_layout(config)
        return read_headers(find_files(source, config, location))
    files = [Path(str(cached_file(source, name, **location))) for name in checked["files"]]
    check_headers(files, checked)
    packed = check_tensors(files)
    _forget_layout(config)
    stored = read_headers(map(str, files))
    return {name: _matrix(name, place) if packed[name] else place for name, place in stored.items()}


def find_stored_of(folder: Path, model: PreTrainedModel, described: Mapping[str, Any]) -> dict[str, Stored]:
    """Returns name -> place of the tensors of a folder that holds a model which is in memory, too.

    `described`: the folder's config, which says how its weights are stored; the model's own does not. Raises as `find_stored`.
    """
    config: Any = copy.deepcopy(model.config)
    for name in LAYOUT_ENTRIES:
        if name in described:
            setattr(config, name, described[name])
    return find_stored(folder, config, {})


def _forget_layout(config: Any) -> None:
    for name in LAYOUT_ENTRIES:
        if hasattr(config, name):
            delattr(config, name)


def _matrix(name: str, place: Stored) -> Stored:
    """Returns a packed tensor's place with the dtype and shape of what it unpacks to; only its header is read."""
    with safe_open(place.file, framework="pt") as file:
        try:
            header = codec.read_header(file.get_tensor(name))
        except ValueError as error:
            raise ValueError(f"{place.file}: {name}: {error}") from None
    return place._replace(dtype=NAMES[header.dtype], shape=header.shape, packed=True)
