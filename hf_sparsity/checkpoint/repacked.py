"""Whether one folder is another one in the other layout: what packing and unpacking end with, and begin with when repeated."""

from __future__ import annotations

import filecmp
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig

from ..model.classes import from_config, text_config
from .atomic import check_output
from .bitmask import codec
from .conversion import some
from .locate import find_stored
from .packed_folder import (
    LAYOUT_ENTRIES,
    METHOD,
    checksums,
    dense_files,
    opened_file,
    other_files,
    read_config,
    unpack_tensor,
)
from .source import try_loading

logger = logging.getLogger(__name__)

_OF_ONE_FOLDER = re.compile(r"README\.md|sparsity_.*")  # files that later commands write into a finished folder


def check_loads(folder: Path) -> None:
    """Raises ValueError for a folder that the class in its config does not load completely.

    A class that cannot be made from the config alone, such as one of the checkpoint's own code, is not tried.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        stored = find_stored(folder, config, {})
        if getattr(text_config(config), "num_hidden_layers", 0) > len(stored):  # too many to build
            raise ValueError(f"its config promises more layers than the {len(stored)} tensors that it has")
        with init_empty_weights(include_buffers=False):
            model = from_config(config)
    except Exception as error:  # a class of anybody's
        logger.info("whether %s loads completely is not tried: %s", folder, error)
        return
    if missing := try_loading(model, stored).missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, which would be random when it is loaded: "
            f"{some(missing)}. Save the whole model first"
        )


def is_repacked(folder: Path, output: Path, *, packed: bool) -> bool:
    """Returns whether `output` is complete already: the model of `folder`, with the same bits, in the other layout.

    `packed`: the layout that the output shall have. False for an output that does not exist or is empty.

    Raises:
        ValueError: the output holds something else; the message says what differs.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not output.is_dir() or not (output / "config.json").is_file():
        check_output(output)
    if is_packed(read_config(output)) is not packed:
        differs = f"it is {'dense' if packed else 'packed'}"
    else:
        differs = difference(folder, output, values=True)
    if differs:
        raise ValueError(
            f"output {str(output)!r} is complete already, of another folder than {str(folder)!r}: {differs}. "
            "Choose another, or remove it"
        )
    logger.info("%s is complete already, of the same folder", output)
    return True


def difference(folder: Path, output: Path, *, values: bool) -> str:
    """Says what a folder in one layout has that its copy in the other has not; "" if they hold the same.

    `values`: compare every bit. Otherwise names, types and shapes of tensors, and names of files, as after writing, when the
    bits are known.
    """
    configs = [read_config(one) for one in (folder, output)]
    entries = [{key: value for key, value in config.items() if key not in LAYOUT_ENTRIES} for config in configs]
    if differing := sorted(k for k in {**entries[0], **entries[1]} if entries[0].get(k) != entries[1].get(k)):
        return f"{', '.join(differing[:3])} in config.json"
    weights = [_weight_files(*pair) for pair in zip((folder, output), configs, strict=True)]
    if name := _differing_tensor(*weights, values=values):
        return f"the tensor {name}"
    for item in other_files(folder, weights[0]):
        for path in (item, *item.rglob("*")):
            copy = output / path.relative_to(folder)
            if not copy.exists() or (values and path.is_file() and not _same_file(path, copy)):
                return str(path.relative_to(folder))
    return ""


def is_packed(config: Mapping[str, Any]) -> bool:
    """Returns whether a config is of a packed folder."""
    described = config.get("quantization_config")
    return isinstance(described, Mapping) and described.get("quant_method") == METHOD


def _weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """Returns the weight files of a folder, dense or packed, in order."""
    return (
        [folder / name for name in config["quantization_config"]["files"]] if is_packed(config) else dense_files(folder)
    )


def _same_file(first: Path, second: Path) -> bool:
    return bool(_OF_ONE_FOLDER.fullmatch(first.name)) or filecmp.cmp(first, second, shallow=False)


def _differing_tensor(first: Sequence[Path], second: Sequence[Path], *, values: bool) -> str:
    """Returns the name of a tensor that two folders' files, in order, do not both have, or not alike; "" if there is none."""
    if len(first) != len(second):
        return f"of another file (there are {len(second)} weight files, not {len(first)})"
    for pair in zip(first, second, strict=True):
        with opened_file(pair[0]) as left, opened_file(pair[1]) as right:
            names = [set(one.keys()) for one in (left, right)]
            if apart := sorted(names[0] ^ names[1]):
                return str(apart[0])
            known = [
                checksums(one) if file.name.startswith("sparse") else None
                for file, one in zip(pair, (left, right), strict=True)
            ]
            for name in sorted(names[0]):
                if not _alike(name, (left.get_tensor(name), right.get_tensor(name)), known, values=values):
                    return str(name)
    return ""


def _alike(name: str, tensors: Sequence[Tensor], known: Sequence[Mapping[str, str] | None], *, values: bool) -> bool:
    """Returns whether two stored tensors are one; `known`: the checksums of each file's dense tensors, None: all are dense."""
    if not values:
        kinds = [
            _kind(tensor, checks is not None and name not in checks)
            for tensor, checks in zip(tensors, known, strict=True)
        ]
        return kinds[0] == kinds[1]
    pairs = zip(tensors, known, strict=True)
    a, b = (tensor if checks is None else unpack_tensor(tensor, name, checks)[0] for tensor, checks in pairs)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(one.contiguous().reshape(-1).view(torch.uint8) for one in (a, b)))  # NaN equals itself


def _kind(tensor: Tensor, packed: bool) -> tuple[torch.dtype, tuple[int, ...]]:
    if packed:
        header = codec.read_header(tensor)
        return header.dtype, tuple(header.shape)
    return tensor.dtype, tuple(tensor.shape)
