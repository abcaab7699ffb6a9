"""Load a model by the class that its checkpoint names; and its tokenizer."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .accepted import check_source, reading
from .classes import find_class, location_of, model_class
from .identity import QUANT_METHOD
from .sparsity import check_zeros

logger = logging.getLogger(__name__)


def load_model(source: str | os.PathLike[str], *, auto_class: Any = None, **options: Any) -> PreTrainedModel:
    """Loads a model, complete: no weight of it is new.

    Args:
        source: a folder or Hub id.
        auto_class: the class to load it with, or its name; by default the one that `config.json` names, see `model_class`.
        **options: to transformers' `from_pretrained`. `trust_remote_code` is off unless given.

    Raises:
        ValueError: an unfinished folder, an adapter, a class that does not go with the checkpoint, or one that has weights
            that the checkpoint does not have.
    """
    options = {"trust_remote_code": False} | options
    location = location_of(options)
    check_source(source, location)
    wanted = options.get("quantization_config")
    if wanted is not None and getattr(wanted, "quant_method", None) != QUANT_METHOD and is_packed(source, **location):
        raise ValueError(
            f"{str(source)!r} is packed (layout 'bitmask'), and only dense files can be quantized while they are loaded: "
            f"write them once with hf_sparsity.unpack({str(source)!r}, folder), and load that folder with quantization_config"
        )
    config = options.get("config")
    with reading(source):
        if isinstance(config, PreTrainedConfig):
            kind = model_class(config, auto_class)
        else:
            gguf = {"gguf_file": options["gguf_file"]} if "gguf_file" in options else {}  # which has its config inside
            kind = find_class(source, auto_class, **location, **gguf)
        model, info = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise ValueError(
            f"{str(source)!r} has no weights for {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}, "
            "so they would be random. Leave the class out (--model-class, auto_class=) if you gave one, or train "
            "and save the model first"
        )
    return model


def is_packed(source: str | os.PathLike[str], **location: Any) -> bool:
    """Returns whether the files of a checkpoint are packed (layout "bitmask")."""
    config = AutoConfig.from_pretrained(source, **location)
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == QUANT_METHOD


def load_sparse(source: str | os.PathLike[str], *, auto_class: Any = None, **options: Any) -> PreTrainedModel:
    """Loads a sparse model as `load_model` does, and checks its zeros against its plan.

    Raises:
        ValueError: what `load_model` refuses, a model without a plan, or zeros that do not match it.
    """
    model = load_model(source, auto_class=auto_class, **options)
    check_zeros(model)
    return model


def find_tokenizer(source: str | os.PathLike[str], **location: Any) -> Any:
    """Returns the checkpoint's tokenizer, or None where it has none: a model can be pruned by its weights alone."""
    try:
        return AutoTokenizer.from_pretrained(source, **location)
    except (OSError, ValueError, TypeError):  # the last: a tokenizer of this model's kind opens None for a missing file
        return None
    except ImportError as error:  # some tokenizers need a package of their own
        logger.warning("the tokenizer of %s is left out: %s", source, error)
        return None
