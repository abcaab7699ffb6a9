"""What each command does. A command prints for people, or returns what `--json` prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME

from .. import demo as demo_model
from ..config import SparsityConfig
from ..core.stats import STATS
from ..hf.batches import prepare_batches
from ..hf.calibration import calibration_batches, read_texts
from ..hf.checkpoint import REPORT_FILE, folder_bytes
from ..hf.estimate import describe, estimate_memory
from ..hf.evaluate import evaluate_text, measure_sparsity, windows
from ..hf.fit import check_plan, plan_config
from ..hf.journal import MARKER, check_finished
from ..hf.layers import find_layout
from ..hf.model import default_length, find_tokenizer
from ..hf.output import Output
from ..hf.pack import pack as pack_folder
from ..hf.pack import unpack as unpack_folder
from ..hf.reconstruct import BlockReconstruction
from ..hf.source import open_streamed
from ..hf.sparsify import make_plan
from ..hf.sparsify import prune as prune_model
from ..plan import Plan, Report, read_json
from . import tables
from .main import parse_algorithm

DEMO = "demo"
DEMO_LENGTH = 512  # windows of the embedded model: what it is judged at


def set_up_progress() -> None:
    """transformers' own bars only where a person looks at a terminal, as ours."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """See `cli/demo.py`."""
    from .demo import demo as run

    return run(options)


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Makes a plan and writes it."""
    if Path(options.output).exists():
        raise ValueError(f"output {options.output!r} exists; choose another name, or remove it")
    config = _config(options)
    model, tokenizer = _load(options)
    batches = _calibration(options, config, model, tokenizer, planning=True)
    made = make_plan(model, config, batches, hidden_limit=_hidden_limit(options))
    made.save(options.output)
    if not options.json:
        print(tables.plan_table(made))
        print(f"plan written to {options.output}")
    return {"plan": options.output, "sparsity": made.sparsity, "target": made.target, "layers": len(made.layers)}


def prune(options: argparse.Namespace) -> dict[str, Any]:
    """Plans unless a plan is given, prunes, saves; goes on where an earlier run was interrupted."""
    made = Plan.load(options.plan) if options.plan else None
    if made is not None and options.sparsity is not None:
        raise ValueError("give --plan or --sparsity, not both: a plan carries its config")
    config = plan_config(made) if made else _config(options)
    output = Output(options.output, overwrite=options.overwrite)
    speaks = output.processes.main and not options.json
    limit = _hidden_limit(options)
    model, tokenizer = _load(options)
    layout = find_layout(model, config.ignore)
    if made is not None:
        check_plan(made, model, layout)
    reconstruct = BlockReconstruction() if options.reconstruct else None
    batches = _calibration(options, config, model, tokenizer, planning=made is None, always=options.reconstruct)
    needs = _needs(config, planning=made is None) & STATS
    prepared = output.processes.share(prepare_batches(model, batches)) if batches is not None else []
    estimate = estimate_memory(model, layout, prepared, needs, hidden_limit=limit, journal=True)
    if speaks:
        print(tables.before(describe(layout, model), estimate))
    if made is None:
        made = make_plan(model, config, batches, output_dir=output, hidden_limit=limit)
    report = prune_model(
        model, made, batches, output_dir=output, hidden_limit=limit, tokenizer=tokenizer, reconstruct=reconstruct
    )
    if speaks:
        print(tables.plan_table(made, report))
        print(tables.after(report))
        print(
            f"saved to {output.path} ({folder_bytes(output.path) / 2**20:.1f} MiB: zeros are stored like other numbers)"
        )
    return {
        "output": str(output.path),
        "sparsity": report.sparsity,
        "target": report.target,
        "seconds": report.seconds,
        "notes": report.notes,
        "skipped": report.skipped,
        "bytes": folder_bytes(output.path),
    }


def interrupted(options: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    marker = Path(getattr(options, "output", None) or "") / MARKER
    if options.command not in ("prune", "recover") or not marker.is_dir():
        return "interrupted; nothing was written"
    return f"interrupted; what is finished is safe in {options.output}. Start the same command again to go on"


def recover(options: argparse.Namespace) -> dict[str, Any]:
    """See `cli/recover.py`."""
    from .recover import recover_command

    return recover_command(options)


def eval(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, and divergence from a second model."""
    if options.text is None and options.model != DEMO and options.against != DEMO:
        raise ValueError("--text is missing: a local text, jsonl or parquet file, or a Hub dataset")
    model, tokenizer = _load(options)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so texts cannot be scored")
    length = options.length or (DEMO_LENGTH if options.text is None else default_length(model, tokenizer))
    text = (
        heldout_text()
        if options.text is None
        else "\n\n".join(read_texts(options.text, split=options.split, column=options.column))
    )
    ids = windows(text, tokenizer, length)[: options.windows]
    reference = None
    if options.against is not None:
        reference, _ = _load(argparse.Namespace(**{**vars(options), "model": options.against}))
    quality = evaluate_text(model, ids, reference)
    if not options.json:
        print(tables.quality(quality, length))
    return {**vars(quality), "length": length}


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """A table per block and projection, reached against planned."""
    path = Path(options.path)
    check_finished(path)
    made = Plan.load(path)
    report = None
    if path.is_dir():
        if (path / REPORT_FILE).exists():
            Report.load(path / REPORT_FILE)  # a damaged report is an error, not something to look past
        kind = _auto_class(path)
        packed = "quantization_config" in read_json(path / CONFIG_NAME)
        model = kind.from_pretrained(path) if packed else open_streamed(path, auto_class=kind)
        report = measure_sparsity(model)
    if not options.json:
        print(tables.plan_header(made))
        print(tables.plan_table(made, report))
        if report is not None:
            print(tables.after(report))
    return {
        "target": made.target,
        "planned": made.sparsity,
        "reached": report.sparsity if report else None,
        "config": dict(made.config),
        "layers": {
            name: {
                "planned": layer.sparsity,
                "reached": report.layers[name].sparsity if report else None,
                "measure": layer.measure,
            }
            for name, layer in made.layers.items()
        },
    }


def pack(options: argparse.Namespace) -> dict[str, Any]:
    """A dense folder into the bitmask layout."""
    return _repacked(options, pack_folder)


def unpack(options: argparse.Namespace) -> dict[str, Any]:
    """A packed folder into the dense layout."""
    return _repacked(options, unpack_folder)


def _repacked(options: argparse.Namespace, change: Callable[[str, str], Path]) -> dict[str, Any]:
    output = change(options.folder, options.output)
    before, after = folder_bytes(options.folder), folder_bytes(output)
    if not options.json:
        print(f"{output}: {after / 2**20:.1f} MiB of weights, {100 * after / before:.1f} % of {before / 2**20:.1f} MiB")
    return {"output": str(output), "bytes": after, "bytes_before": before}


def _config(options: argparse.Namespace) -> SparsityConfig:
    return SparsityConfig(
        sparsity=options.sparsity,
        pattern=options.pattern,
        allocator=parse_algorithm(options.allocator),
        row_allocator=parse_algorithm(options.row_allocator),
        pruner=parse_algorithm(options.pruner),
        ignore=tuple(options.ignore),
        seed=options.seed,
    )


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer or None)."""
    stream = getattr(options, "stream", False)
    if options.model == DEMO and not stream:
        return load_demo()
    location = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    source = demo_model.PATH if options.model == DEMO else options.model
    if Path(source).is_dir():
        check_finished(source)
    auto_class = _auto_class(source, **location)
    if stream:
        if options.offload_folder:
            raise ValueError("give --stream or --offload-folder, not both: a streamed model is read from its own files")
        device = options.device_map
        if device == "auto":
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model = open_streamed(source, auto_class=auto_class, dtype=options.dtype, device=device, **location)
    else:
        placing = {"device_map": options.device_map, "offload_folder": options.offload_folder}
        placing = placing if options.device_map else {}
        model = auto_class.from_pretrained(source, dtype=options.dtype, **location, **placing)
    return model, find_tokenizer(source, **location)


def _auto_class(source: str | Path, **location: Any) -> Any:
    """The Auto class with the head that makes text, for decoders or encoder-decoders."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    kind = AutoConfig.from_pretrained(source, **location).model_type
    only_both = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForSeq2SeqLM if only_both else AutoModelForCausalLM


def _hidden_limit(options: argparse.Namespace) -> int | None:
    """Bytes."""
    if options.hidden_limit is None:
        return None
    if not options.hidden_limit >= 0:
        raise ValueError(
            f"--hidden-limit is {options.hidden_limit}; GiB of memory are expected, 0 for as few as possible"
        )
    return int(options.hidden_limit * 2**30)


def load_demo() -> tuple[Any, Any]:
    """(model, tokenizer) of the embedded default."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(demo_model.PATH), AutoTokenizer.from_pretrained(demo_model.PATH)


def heldout_text() -> str:
    """The embedded model's held-out modules, joined."""
    return "\n\n".join(text for _, text in demo_model.texts("heldout"))


def _needs(config: SparsityConfig, *, planning: bool) -> frozenset[str]:
    needs = config.pruner.needs | (config.row_allocator.needs if config.row_allocator else frozenset())  # type: ignore[union-attr]
    return needs | config.allocator.needs if planning else needs  # type: ignore[union-attr]


def _calibration(
    options: argparse.Namespace,
    config: SparsityConfig,
    model: Any,
    tokenizer: Any,
    *,
    planning: bool,
    always: bool = False,
) -> Any:
    """Token ids, or None where nothing needs them."""
    if not always and not _needs(config, planning=planning):
        return None
    if options.calibration is None and options.model == DEMO:
        data: Any = [text for _, text in demo_model.texts("calibration")]
        length = options.length or DEMO_LENGTH
    elif options.calibration is None:
        raise ValueError("--calibration is missing: a local text, jsonl or parquet file, or a Hub dataset such as c4")
    else:
        data, length = options.calibration, options.length or default_length(model, tokenizer)
    return calibration_batches(
        data, tokenizer, sequences=options.sequences, length=length, seed=config.seed, column=options.column
    )
