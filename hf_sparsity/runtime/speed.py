"""Measured speed of a sparse model: packed, and dense in bf16 and float32, in turn in one run; kept in the model's folder.

    {"version": 1, "machine": {"cpu", "threads", "torch", "transformers", "load"}, "prompt", "tokens", "repeats",
     "against": name, "models": {name: {"bytes", "prefill": tokens a second, "first_token": seconds,
                                        "decode": {batch: tokens a second}, "read": GB of weights a second}},
     "ratios": {"decode": {batch: packed against the faster dense}, "prefill", "bytes": dense bf16 against packed}}

Medians; every repeat takes one step of each model, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..plan import read_json, write_json

SPEED_FILE = "sparsity_speed.json"
VERSION = 1
PACKED = "packed"
BATCHES = (1, 2, 4)


def measure_speed(
    models: Mapping[str, PreTrainedModel], *, prompt: int = 64, tokens: int = 32, repeats: int = 5, against: str = ""
) -> dict[str, Any]:
    """Measures decoding and prefill of models that take the same tokens, in turn.

    Args:
        models: {name: model}; the packed one is called "packed".
        prompt: tokens of the prompt, random ones.
        tokens: that are decoded with each batch.
        repeats: of the prefill.
        against: what the dense models were loaded from, for the record.

    Returns:
        What stands at the top of this file.

    Raises:
        ValueError: no model called "packed", or counts below 1.
    """
    if PACKED not in models or min(prompt, tokens, repeats) < 1:
        raise ValueError(f"speed is measured of {PACKED!r} and others, with at least 1 token and repeat")
    embedding: Any = next(iter(models.values())).get_input_embeddings()
    ids = torch.randint(0, len(embedding.weight), (max(BATCHES), prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        prefill = _in_turn({name: partial(model, ids[:1]) for name, model in models.items()}, repeats)
        decode = {batch: _decode(models, ids[:batch], tokens) for batch in BATCHES}
    rows = {}
    for name, model in models.items():
        rows[name] = {
            "bytes": model.get_memory_footprint(),
            "prefill": prompt / prefill[name],
            "first_token": prefill[name],
            "decode": {str(batch): batch / seconds[name] for batch, seconds in decode.items()},
            "read": bytes_read(model) / decode[1][name] / 1e9,
        }
    return {
        "version": VERSION,
        "machine": _machine(),
        "prompt": prompt,
        "tokens": tokens,
        "repeats": repeats,
        "against": against,
        "models": rows,
        "ratios": _ratios(rows),
    }


def _in_turn(jobs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Returns the median seconds of each job; the first turn compiles and fills caches, and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def _decode(models: Mapping[str, PreTrainedModel], ids: Tensor, tokens: int) -> dict[str, float]:
    """Returns the median seconds of one step of each model after a prompt."""
    states: dict[str, Any] = {name: model(ids, use_cache=True) for name, model in models.items()}

    def step(name: str) -> None:
        following = states[name].logits[:, -1:].argmax(-1)
        states[name] = models[name](following, past_key_values=states[name].past_key_values, use_cache=True)

    return _in_turn({name: partial(step, name) for name in models}, tokens)


def bytes_read(model: PreTrainedModel) -> int:
    """Returns the bytes of weights that one step reads: all, but of an embedding that is not the head a row only."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return model.get_memory_footprint() - (0 if tied else embedding.weight.nbytes)


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns how many times as fast the packed model is as the faster of the others, and how many times smaller."""
    dense = [row for name, row in rows.items() if name != PACKED]
    if not dense:
        return {}
    ours = rows[PACKED]
    return {
        "decode": {
            batch: ours["decode"][batch] / max(row["decode"][batch] for row in dense) for batch in ours["decode"]
        },
        "prefill": ours["prefill"] / max(row["prefill"] for row in dense),
        "bytes": min(row["bytes"] for row in dense) / ours["bytes"],
    }


def _machine() -> dict[str, Any]:
    """Returns what the numbers depend on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu() -> str:
    """Returns the CPU's name as Linux gives it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_speed(folder: str | os.PathLike[str], speed: Mapping[str, Any]) -> Path:
    """Keeps a measurement in a model's folder, whole or not at all; returns its path."""
    path = Path(folder) / SPEED_FILE
    write_json(path, dict(speed))
    return path


def read_speed(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns the measurement in a folder, or None. Raises ValueError for a damaged file."""
    path = Path(folder) / SPEED_FILE
    if not path.exists():
        return None
    speed = read_json(path)
    numbers = (
        [*_numbers(speed.get("ratios", {})), *_numbers(speed.get("models", {}))] if isinstance(speed, dict) else []
    )
    if not numbers or speed.get("version") != VERSION or not all(number >= 0 for number in numbers):
        raise ValueError(
            f"{path} is not a measurement of speed that this release reads; measure again (hf-sparsity bench)"
        )
    return speed


def _numbers(value: Any) -> Sequence[float]:
    """Returns all numbers in nested dicts; what is neither counts as -1."""
    if isinstance(value, Mapping):
        return [number for each in value.values() for number in _numbers(each)]
    return [value] if isinstance(value, (int, float)) and value == value else [-1.0]
