"""Write a sparse model to a folder: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..plan import Report

REPORT_FILE = "sparsity_report.json"


def check_output(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path; `ValueError` when it exists and holds anything."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {str(path)!r} exists and is not an empty folder; choose another, or remove it")
    return path


def save_checkpoint(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, report: Report | None = None, tokenizer: Any = None
) -> Path:
    """Saves model, tokenizer and report beside the target under a temporary name, checks the zeros, then renames.

    Raises:
        ValueError: the folder holds other files.
        RuntimeError: the files have fewer zeros than the report says.
    """
    path = check_output(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if report is not None:
            report.save(temporary / REPORT_FILE)
            written, expected = count_zeros(temporary), sum(layer.zeros for layer in report.layers.values())
            if written < expected:
                raise RuntimeError(
                    f"the files written have {written} zeros where pruning made {expected}; nothing was saved"
                )
        os.chmod(temporary, 0o755)
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def count_zeros(folder: Path) -> int:
    """Zeros in all matrices of a folder's safetensors files, read tensor by tensor."""
    zeros = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                tensor = tensors.get_tensor(name)
                if tensor.ndim >= 2:
                    zeros += int(torch.count_nonzero(tensor == 0))
    return zeros


def folder_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
