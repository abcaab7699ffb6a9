"""What commands start from: the config, the model and the calibration text that their arguments ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .. import demo as demo_model
from ..calibration.calibration import calibration_batches, default_length
from ..calibration.mixture import Source
from ..checkpoint.streamed import open_streamed
from ..config import SparsityConfig
from ..files import check_finished
from ..model.loading import find_tokenizer
from .arguments import parse_algorithm, parse_source

DEMO = "demo"
DEMO_LENGTH = 512  # windows of the embedded model: what it is judged at


def sparsity_config(options: argparse.Namespace) -> SparsityConfig:
    """What the arguments of `add_config` say."""
    return SparsityConfig(
        sparsity=options.sparsity,
        pattern=options.pattern,
        allocator=parse_algorithm(options.allocator),
        row_allocator=parse_algorithm(options.row_allocator),
        pruner=parse_algorithm(options.pruner),
        ignore=tuple(options.ignore),
        seed=options.seed,
    )


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer or None)."""
    stream = getattr(options, "stream", False)
    if options.model == DEMO and not stream:
        return load_demo()
    location = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    source = demo_model.PATH if options.model == DEMO else options.model
    if Path(source).is_dir():
        check_finished(source)
    kind = auto_class(source, **location)
    if stream:
        if options.offload_folder:
            raise ValueError("give --stream or --offload-folder, not both: a streamed model is read from its own files")
        device = options.device_map
        if device == "auto":
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model = open_streamed(source, auto_class=kind, dtype=options.dtype, device=device, **location)
    else:
        placing = {"device_map": options.device_map, "offload_folder": options.offload_folder}
        placing = placing if options.device_map else {}
        model = kind.from_pretrained(source, dtype=options.dtype, **location, **placing)
    return model, find_tokenizer(source, **location)


def auto_class(source: str | Path, **location: Any) -> Any:
    """The Auto class with the head that makes text, for decoders or encoder-decoders."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    kind = AutoConfig.from_pretrained(source, **location).model_type
    only_both = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForSeq2SeqLM if only_both else AutoModelForCausalLM


def load_demo() -> tuple[Any, Any]:
    """(model, tokenizer) of the embedded default."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(demo_model.PATH), AutoTokenizer.from_pretrained(demo_model.PATH)


def heldout_text() -> str:
    """The embedded model's held-out modules, joined."""
    return "\n\n".join(text for _, text in demo_model.texts("heldout"))


def hidden_limit(options: argparse.Namespace) -> int | None:
    """Bytes."""
    if options.hidden_limit is None:
        return None
    if not options.hidden_limit >= 0:
        raise ValueError(
            f"--hidden-limit is {options.hidden_limit}; GiB of memory are expected, 0 for as few as possible"
        )
    return int(options.hidden_limit * 2**30)


def needed(config: SparsityConfig, *, planning: bool) -> frozenset[str]:
    """What the algorithms need to know of each layer: to prune, and with `planning` to plan as well."""
    needs = config.pruner.needs | (config.row_allocator.needs if config.row_allocator else frozenset())
    return needs | config.allocator.needs if planning else needs


def calibration(
    options: argparse.Namespace,
    config: SparsityConfig,
    model: Any,
    tokenizer: Any,
    *,
    planning: bool,
    always: bool = False,
) -> Any:
    """Token ids, of several sources a `Mixture`; or None where nothing needs them."""
    if not always and not needed(config, planning=planning):
        return None
    if not options.calibration and options.model == DEMO:
        data: Any = [text for _, text in demo_model.texts("calibration")]
        length = options.length or DEMO_LENGTH
    elif not options.calibration:
        raise ValueError("--calibration is missing: a local text, jsonl or parquet file, or a Hub dataset such as c4")
    else:
        data = [Source(**parse_source(text)) for text in options.calibration]
        length = options.length or default_length(model, tokenizer)
    return calibration_batches(
        data,
        tokenizer,
        sequences=options.sequences,
        length=length,
        seed=config.seed,
        column=options.column,
        model=model,
    )
