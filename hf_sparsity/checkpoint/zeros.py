"""What the files of a sparse checkpoint hold: zeros, bytes, and a report beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from ..plan import LayerReport

REPORT_FILE = "sparsity_report.json"


def check_written(files: Iterable[Path], layers: Mapping[str, LayerReport]) -> None:
    """Raises RuntimeError when dense files, read again, have fewer zeros than the reports of their layers say."""
    written, expected = sum(map(count_zeros, files)), sum(layer.zeros for layer in layers.values())
    if written < expected:
        raise RuntimeError(
            f"the files have {written} zeros where the report has {expected}: were the weights changed after pruning?"
        )


def count_zeros(file: Path) -> int:
    """Counts the zeros in all matrices of a safetensors file, which is read tensor by tensor."""
    zeros = 0
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a dict)
            tensor = tensors.get_tensor(name)
            if tensor.ndim >= 2:
                zeros += tensor.numel() - int(torch.count_nonzero(tensor))
    return zeros


def folder_bytes(folder: str | os.PathLike[str]) -> int:
    """Returns the size of the weight files in a folder, in bytes."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
