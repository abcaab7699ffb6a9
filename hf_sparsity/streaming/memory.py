"""Estimates, before pruning starts: what it will touch, and the memory and disk it will take."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.stats import GRAM, SAMPLES
from ..model.classes import text_config
from ..model.devices import accelerators, block_device, free_memory
from ..model.inference import Batch
from ..model.layers import Block, ModelLayers
from ..model.offload import weight_store

GROUPS = Path("/sys/fs/cgroup")  # where Linux tells the limits of a container


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory and disk that a run takes.

    `model`: weights that stay in memory: all of them, or what is outside the blocks and one block when streamed or
    offloaded. `hidden`: hidden states of the calibration batches. `block`: one block's statistics, scores, working
    copies of its largest matrix, and the copy that computes. `disk`: the output. `resident`: the part of `model` that is
    in memory already. `devices`: of each accelerator, its weights, one of its blocks with statistics and working copies,
    and one batch; `present`: the part of that that is there already. On accelerators hidden states wait on the host.
    """

    model: int
    hidden: int
    block: int
    disk: int
    resident: int = 0
    devices: Mapping[str, int] = field(default_factory=dict)
    present: Mapping[str, int] = field(default_factory=dict)

    def check_devices(self) -> None:
        """Raises ValueError with advice when an accelerator's free memory cannot hold the run."""
        for name, whole in self.devices.items():
            need, free = whole - self.present[name], free_memory(torch.device(name))
            if free is not None and need > free:
                raise ValueError(
                    f"about {need / 2**30:.2f} GiB more memory are needed on {name} and {free / 2**30:.2f} GiB are free: stream "
                    "the model onto it (offload='stream', --stream), spread it over several devices (device_map='auto', "
                    "--device-map auto), use a pruner that needs no Gram matrix, such as 'wanda', or fewer sequences in a batch"
                )

    @property
    def peak(self) -> int:
        """Bytes of memory in all."""
        return self.model + self.hidden + self.block

    def check(self, output: str | os.PathLike[str] | None = None, *, memory: int | None = None) -> None:
        """Raises ValueError with advice when memory (by default what is free) or the output's disk cannot hold the run."""
        free = available_memory() if memory is None else memory
        if (need := self.peak - self.resident) > free:
            advice = (
                "keep fewer hidden states in memory (hidden_limit, --hidden-limit)" if self.hidden > need / 2 else ""
            )
            advice = (
                advice or "stream the model from disk (offload='stream', --stream), or use fewer or shorter sequences"
            )
            raise ValueError(
                f"about {need / 2**30:.2f} GiB more memory are needed and {free / 2**30:.2f} GiB are free: {advice}"
            )
        if output is not None:
            folder = next(p for p in [Path(output).absolute(), *Path(output).absolute().parents] if p.exists())
            room = shutil.disk_usage(folder).free
            if self.disk > room:
                raise ValueError(
                    f"the output takes about {self.disk / 2**30:.2f} GiB and {folder} has {room / 2**30:.2f} GiB free: "
                    "choose another output, or make room"
                )


def estimate_memory(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    batches: Sequence[Batch],
    needs: frozenset[str],
    *,
    hidden_limit: int | None = None,
    journal: bool = False,
    computes: torch.dtype | None = None,
) -> Estimate:
    """Returns what `prune` will hold at once, from shapes alone; activations inside one block call come on top.

    Args:
        needs: the facts of the inputs that are collected.
        hidden_limit: see `prune`.
        journal: whether the run is written to a folder, which also keeps the hidden states on disk.
        computes: the dtype that computes; None: the model's own. In another, a block is copied.
    """
    config = text_config(model.config)
    whole = _bytes(model.parameters())
    resident = _bytes(p for p in model.parameters() if p.device.type != "meta")
    inside = [_bytes(block.module.parameters()) for block in model_layers.blocks]
    away = any(p.device.type == "meta" for p in model.parameters())
    weights = resident + max(inside) if away else whole
    own = next(model.parameters()).dtype
    itemsize = (computes or own).itemsize
    copied = 0 if computes in (None, own) else max(inside) // own.itemsize * itemsize
    longest, tokens = 0, 0
    for batch in batches:
        count = batch.get("input_ids", next(iter(batch.values()))).numel()
        longest, tokens = max(longest, count), tokens + count
    hidden = tokens * (getattr(config, "hidden_size", 0) or 0) * itemsize if needs else 0
    kept = hidden if hidden_limit is None else min(hidden, hidden_limit + 2 * hidden * longest // max(tokens, 1))
    spilled = hidden if kept < hidden else 0
    devices, present = _on_devices(model, model_layers, needs, len(batches), 2 * hidden * longest // max(tokens, 1))
    return Estimate(
        weights,
        kept,
        max(_block_bytes(block, needs, len(batches)) for block in model_layers.blocks) + copied,
        (whole if journal else 0) + (2 * hidden if journal else 0) + spilled,
        resident if weight_store(model) is None else 0,
        devices,
        present,
    )


def _on_devices(
    model: PreTrainedModel, model_layers: ModelLayers, needs: frozenset[str], sequences: int, batch: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns (bytes that each accelerator will hold at most, those of its weights that are there already).

    `batch`: bytes of the inputs and the output of a block on the largest batch.
    """
    present = {str(d): _bytes(p for p in model.parameters() if p.device == d) for d in accelerators(model)}
    most = dict.fromkeys(present, 0)
    for block in model_layers.blocks:
        if (name := str(block_device(block.module))) in most:
            lent = _bytes(p for p in block.module.parameters() if p.device.type == "meta")
            most[name] = max(most[name], lent + _block_bytes(block, needs, sequences) + batch)
    return {name: present[name] + most[name] for name in present}, present


def check_room(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    batches: Sequence[Batch],
    needs: frozenset[str],
    *,
    hidden_limit: int | None,
    output: Path | None,
    computes: torch.dtype | None = None,
) -> Estimate:
    """Returns what the run will take; raises ValueError with advice when memory or disk cannot hold it.

    Of a model on accelerators their memory is checked, and that of the host is not.
    """
    estimate = estimate_memory(
        model,
        model_layers,
        batches,
        needs,
        hidden_limit=hidden_limit,
        journal=output is not None,
        computes=computes,
    )
    on_host = all(p.device.type in ("cpu", "meta") for p in model.parameters())
    estimate.check(output, memory=None if on_host else estimate.peak)
    estimate.check_devices()
    return estimate


def available_memory() -> int:
    """Returns the bytes that this process may still take: free memory, within the container's limit if there is one."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        limit = (GROUPS / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((GROUPS / "memory.current").read_text()))
    return free


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _block_bytes(block: Block, needs: frozenset[str], sequences: int) -> int:
    """Returns the bytes of one block's statistics and working copies.

    Layers fed by the same tensor share a Gram matrix; layers of one width and one parent are taken for such.
    """
    if not block.weights:
        return 0
    total = 0
    grams = set()
    for weight in block.weights.values():
        width = weight.shape[1]
        grams.add((weight.name.rpartition(".")[0], weight.expert, width))
        total += 4 * width if needs else 0
        total += 4 * width * sequences if SAMPLES in needs else 0
    if GRAM in needs:
        total += sum(4 * width**2 for _, _, width in grams)
    largest = max(weight.size for weight in block.weights.values())
    widest = max(weight.shape[1] for weight in block.weights.values())
    return total + 4 * largest * 3 + (4 * widest * widest * 2 if GRAM in needs else 0)


def describe(model_layers: ModelLayers, model: PreTrainedModel) -> dict[str, Any]:
    """Returns `{"layers", "blocks", "weights", "share", "dense": {reason: number of matrices}}` of what can be pruned.

    `share`: of all the model's parameters, those in prunable layers.
    """
    weights = sum(weight.size for weight in model_layers.weights.values())
    return {
        "layers": len(model_layers.weights),
        "blocks": len(model_layers.blocks),
        "weights": weights,
        "share": weights / sum(p.numel() for p in model.parameters()),
        "dense": dict(Counter(model_layers.skipped.values())),
    }
