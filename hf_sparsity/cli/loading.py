"""Load what the arguments of a command ask for: the config, the model, the calibration text."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import demo as demo_model
from ..calibration.calibration import calibration_batches
from ..calibration.mixture import Source
from ..calibration.positions import default_length
from ..checkpoint.streamed import open_streamed
from ..config import SparsityConfig
from ..model.loading import find_tokenizer, load_model
from ..validation import check_number
from .arguments import parse_algorithm, parse_source

DEMO = demo_model.NAME


def sparsity_config(options: argparse.Namespace) -> SparsityConfig:
    """Returns the config that the arguments of `add_config` describe."""
    return SparsityConfig(
        sparsity=options.sparsity,
        pattern=options.pattern,
        allocator=parse_algorithm(options.allocator),
        row_allocator=parse_algorithm(options.row_allocator),
        pruner=parse_algorithm(options.pruner),
        ignore=tuple(options.ignore),
        include=tuple(options.include),
        seed=options.seed,
        refit=options.refit,
        refine=options.refine,
        allow_unseen=options.allow_unseen,
        compute_dtype=options.compute_dtype,
    )


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model that the arguments of `add_model` name, and its tokenizer or None.

    Raises:
        ValueError: a checkpoint or a class that cannot be opened, or arguments that contradict each other.
    """
    stream = getattr(options, "stream", False)
    if options.model == DEMO and not stream:
        return load_demo()
    location = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    source = demo_model.resolve(options.model)
    if stream:
        if options.offload_folder:
            raise ValueError("give --stream or --offload-folder, not both: a streamed model is read from its own files")
        device = options.device_map
        if device == "auto":
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model = open_streamed(source, auto_class=options.model_class, dtype=options.dtype, device=device, **location)
    else:
        placing = {"device_map": options.device_map, "offload_folder": options.offload_folder}
        placing = placing if options.device_map else {}
        model = load_model(source, auto_class=options.model_class, dtype=options.dtype, **location, **placing)
    return model, find_tokenizer(source, **location)


def load_demo() -> tuple[Any, Any]:
    """Returns the embedded model and its tokenizer."""
    return load_model(demo_model.PATH), find_tokenizer(demo_model.PATH)


def heldout_text() -> str:
    """Returns the held-out text of the embedded model, its parts joined by empty lines."""
    return "\n\n".join(text for _, text in demo_model.texts("heldout"))


def hidden_limit(options: argparse.Namespace) -> int | None:
    """Returns `--hidden-limit`, which is in GiB, in bytes; None where it was not given."""
    if options.hidden_limit is None:
        return None
    check_number(
        "--hidden-limit", options.hidden_limit, "[0, inf)", hint=": GiB of memory, 0 to keep as few as possible"
    )
    return int(options.hidden_limit * 2**30)


def needed(config: SparsityConfig, *, planning: bool) -> frozenset[str]:
    """Returns the facts of a layer that the algorithms of a config need: to prune, and with `planning` also to plan."""
    return config.pruning_needs | config.allocator.needs if planning else config.pruning_needs


def calibration(
    options: argparse.Namespace,
    config: SparsityConfig,
    model: Any,
    tokenizer: Any,
    *,
    planning: bool,
    always: bool = False,
) -> Any:
    """Returns the calibration data: token ids `[sequences, tokens]`, for several sources a `Mixture`.

    None where the algorithms need none, unless `always`.
    """
    if not always and not needed(config, planning=planning):
        return None
    return calibration_text(options, config.seed, model, tokenizer)


def calibration_text(options: argparse.Namespace, seed: int, model: Any, tokenizer: Any) -> Any:
    """Returns the calibration data: token ids `[sequences, tokens]`, for several sources a `Mixture`."""
    if not options.calibration and options.model == DEMO:
        data: Any = [text for _, text in demo_model.texts("calibration")]
        length = options.length or demo_model.LENGTH
    elif not options.calibration:
        raise ValueError("--calibration is missing: a local file, such as text or jsonl, or a Hub dataset, such as c4")
    else:
        data = [Source(**parse_source(text)) for text in options.calibration]
        length = options.length or default_length(model, tokenizer)
    return calibration_batches(
        data,
        tokenizer,
        sequences=options.sequences,
        length=length,
        seed=seed,
        column=options.column,
        split=options.split,
        model=model,
    )
