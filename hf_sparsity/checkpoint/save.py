"""Saves a sparse model with its plan."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from ..model.accepted import check_kind, check_path, check_tokenizer, refuse_adapters
from ..model.identity import forget_packing, renew_identity
from ..model.sparsity import refuse_foreign_plan
from ..plan import Report
from .atomic import new_folder
from .completion import check_writable, complete
from .packed_folder import METHOD, check_layout, pack_into, refuse_unless_prunable
from .saved import is_saved
from .source import find_source
from .zeros import REPORT_FILE, check_written


def save_sparse(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    layout: Literal["dense", "bitmask"] = "dense",
    report: Report | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Saves a model whole or not at all: written beside the target under a temporary name, checked, then renamed.

    Args:
        model: any transformers model.
        path: a folder that does not exist, or is empty. One that holds this very model already is left as it is.
        layout: `dense`, ordinary files with zeros in them; `bitmask`, the pruned matrices packed.
        report: saved beside the weights; the zeros of the files are counted against it.
        tokenizer: saved beside the weights.
        max_shard_size: bytes, or a string as transformers takes it ("5GB"), of the dense files; a packed file holds
            the tensors of one dense file.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds other files or another model; an unknown layout; `bitmask` for a model that is quantized, has no
            plan, or no zeros worth packing; a plan in the model's config that is another model's.
        RuntimeError: the files have fewer zeros than the report says, or would not load completely.
    """
    check_kind(model)
    refuse_adapters(model)
    check_path(path)
    check_tokenizer(tokenizer)
    if report is not None and not isinstance(report, Report):
        raise ValueError(f"report is a {type(report).__name__}; what prune returned is expected, or None")
    check_layout(layout)
    quantized = getattr(model, "hf_quantizer", None)
    if quantized is not None and getattr(quantized.quantization_config, "quant_method", None) == METHOD:
        raise ValueError(
            "this model is packed in memory: model.save_pretrained(folder) writes the packed layout, and after "
            "hf_sparsity.unpack_model(model) it is saved as any other"
        )
    forget_packing(model.config)
    refuse_foreign_plan(model)
    check_writable(model)
    if layout == "bitmask":
        refuse_unless_prunable(model.config.to_dict())
    if is_saved(model, Path(path), layout):
        renew_identity(model, path)
        return Path(path)
    with new_folder(path) as temporary:
        dense = temporary / ".dense" if layout == "bitmask" else temporary
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(dense, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(dense)
        if report is not None:
            report.save(dense / REPORT_FILE)
            check_written(dense.glob("*.safetensors"), report.layers)
        complete(dense, model, find_source(model), tokenizer=tokenizer)
        if layout == "bitmask":
            pack_into(dense, temporary, consume=True)
            shutil.rmtree(dense)
    if getattr(model.config, "sparsity_config", None) is not None:
        renew_identity(model, path)
    return Path(path)
