"""Load what belongs to a model: its tokenizer, its class."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..files import check_finished
from .sparsity import check_zeros

# Keywords that say where a checkpoint is; the tokenizer is found with the same.
LOCATION = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only", "trust_remote_code")


def load_sparse(source: str | os.PathLike[str], *, auto_class: Any = None, **options: Any) -> PreTrainedModel:
    """Loads a sparse model and checks its zeros against its plan.

    Args:
        source: a folder or Hub id.
        auto_class: by default `AutoModelForCausalLM`.
        **options: to transformers' `from_pretrained`.

    Raises:
        ValueError: an unfinished folder, a model without a plan, or zeros that do not match it.
    """
    if os.path.isdir(source):
        check_finished(source)
    model = (auto_class or AutoModelForCausalLM).from_pretrained(source, **options)
    check_zeros(model)
    return model


def find_tokenizer(source: str | os.PathLike[str], **location: Any) -> Any:
    """The checkpoint's tokenizer; None where there is none: a model can be pruned by its weights without one."""
    try:
        return AutoTokenizer.from_pretrained(source, **location)
    except (OSError, ValueError):
        return None
