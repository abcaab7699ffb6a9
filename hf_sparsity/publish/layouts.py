"""Changes the layout of a finished sparse folder: dense to packed and back."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.atomic import new_folder
from ..checkpoint.packed_folder import (
    check_description,
    check_headers,
    check_index,
    check_tensors,
    copy_other_files,
    pack_into,
    read_config,
    unpack_tensor,
    write_shards,
)
from ..model.accepted import check_path
from ..plan import write_json


def pack(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Rewrites the folder of a sparse model with its pruned matrices packed; about one shard is in memory.

    All other files are copied; a card made by `make_card` is rendered again for the new layout. Returns `output`.

    Raises:
        FileNotFoundError: no config or weights.
        ValueError: `output` holds files; the folder is packed or quantized already, has no plan in its `config.json`,
            nothing worth packing, or files that are damaged or point outside it.
    """
    from ..publish.card.make_card import refresh  # it knows the sizes of both layouts

    check_path(folder)
    with new_folder(output) as temporary:
        pack_into(Path(folder), temporary)
        refresh(temporary)
    return Path(output)


def unpack(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Rewrites a packed folder as ordinary files that load everywhere; about one dense shard is in memory.

    Returns `output`.

    Raises:
        FileNotFoundError: no config or weights.
        ValueError: `output` holds files, or the folder is not packed or is damaged in any way.
    """
    from ..publish.card.make_card import refresh

    check_path(folder)
    folder = Path(folder)
    config = read_config(folder)
    described = check_description(config.get("quantization_config"))
    check_index(folder, described)
    sources = [folder / name for name in described["files"]]
    check_headers(sources, described)
    check_tensors(sources)
    with new_folder(output) as temporary:
        copy_other_files(folder, temporary)
        for key in ("quantization_config", "transformers_weights"):
            config.pop(key, None)
        write_json(temporary / "config.json", config)
        write_shards(sources, temporary, "model", unpack_tensor)
        refresh(temporary)
    return Path(output)
