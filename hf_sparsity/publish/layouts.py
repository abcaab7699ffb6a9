"""Changes the layout of a finished sparse folder: dense to packed and back."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.atomic import new_folder
from ..checkpoint.packed_folder import (
    LAYOUT_ENTRIES,
    check_description,
    check_headers,
    check_index,
    check_tensors,
    copy_other_files,
    dense_files,
    pack_into,
    read_config,
    refuse_unless_prunable,
    unpack_tensor,
    write_shards,
)
from ..checkpoint.repacked import check_loads, difference, is_repacked
from ..files import check_finished
from ..model.accepted import check_path
from ..plan import write_json


def pack(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Rewrites the folder of a sparse model with its pruned matrices packed; about one shard is in memory.

    All other files are copied; a card made by `make_card` is rendered again for the new layout. An output that is complete
    already, of the same folder, is left as it is.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: no config or weights.
        ValueError: `output` holds other files or another model; the folder is unfinished, packed or quantized already, has no
            plan in its `config.json`, lacks tensors of its class, has nothing worth packing, or files that are damaged or
            point outside it.
        RuntimeError: what was written is not all of the folder.
    """
    from ..publish.card.make_card import refresh  # it knows the sizes of both layouts

    check_path(folder)
    folder, output = Path(folder), Path(output)
    if is_done(folder, output, "bitmask"):
        return output
    dense_files(folder)  # raises for an index that is too large or points outside, before anything else reads it
    check_loads(folder)
    with new_folder(output) as temporary:
        pack_into(folder, temporary)
        _check_copied(folder, temporary)
        refresh(temporary)
    return output


def unpack(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Rewrites a packed folder as ordinary files that load everywhere; about one dense shard is in memory.

    An output that is complete already, of the same folder, is left as it is.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: no config or weights.
        ValueError: `output` holds other files or another model, or the folder is not packed, lacks tensors of its class or is
            damaged in any way.
        RuntimeError: what was written is not all of the folder.
    """
    from ..publish.card.make_card import refresh

    check_path(folder)
    folder, output = Path(folder), Path(output)
    if is_done(folder, output, "dense"):
        return output
    config = read_config(folder)
    sources = [folder / name for name in config["quantization_config"]["files"]]
    check_headers(sources, config["quantization_config"])
    check_tensors(sources)
    check_loads(folder)
    with new_folder(output) as temporary:
        copy_other_files(folder, temporary, sources)
        for key in LAYOUT_ENTRIES:
            config.pop(key, None)
        write_json(temporary / "config.json", config)
        write_shards(sources, temporary, "model", unpack_tensor)
        _check_copied(folder, temporary)
        refresh(temporary)
    return output


def is_done(folder: str | os.PathLike[str], output: str | os.PathLike[str], layout: str) -> bool:
    """Returns whether `output` is complete already: the model in `folder`, bit for bit, in this layout.

    Raises:
        FileNotFoundError: the folder has no config.
        ValueError: the folder is not in the other layout, or unfinished; the output holds something else.
    """
    folder = Path(folder)
    check_finished(folder)
    config = read_config(folder)
    if layout == "bitmask":
        refuse_unless_prunable(config)
    else:
        check_index(folder, check_description(config.get("quantization_config")))
    return is_repacked(folder, Path(output), packed=layout == "bitmask")


def _check_copied(folder: Path, temporary: Path) -> None:
    """Raises RuntimeError unless a folder that was just written has all that its source has."""
    if lost := difference(folder, temporary, values=False):
        raise RuntimeError(f"what was written is not all of {folder}: {lost} is missing or differs. Please report this")
