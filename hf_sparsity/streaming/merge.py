"""Statistics over the sequences of all processes, from those that each process collected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core.stats import GRAM, SAMPLES, InputStats
from ..distributed import Processes


def merge_stats(
    processes: Processes,
    stats: Mapping[str, InputStats],
    devices: Mapping[str, torch.device],
    *,
    needs: frozenset[str],
    sequences: int,
) -> dict[str, InputStats]:
    """Returns statistics over the sequences of all processes; the objects passed in are used up.

    They equal those of one process that saw all sequences, up to the rounding of float32, with the same bits on
    all processes; `samples` are in calibration order if the sequences were split by `Processes.share`. Layers share
    one object if they do on every process. A layer that some process never saw (an expert) is there if any saw it.
    All processes must call this together.

    Args:
        stats: closed, by layer; layers that no token reached may be missing.
        devices: where the statistics of each layer belong; names all layers, in the same order on all processes.
        needs: what was collected, the same on all processes.
        sequences: number that this process saw (0 if none), with which its stats were closed.
    """
    if processes.count == 1:
        return dict(stats)
    groups = _groups(processes, stats, devices, needs, sequences)
    if GRAM in needs:
        for group in groups:
            if group.width:
                group.stats.replace_gram(group.width, group.device, processes.sum)
    else:
        _average_squares(processes, groups)
    for group in groups:
        if SAMPLES in needs:
            _join_samples(processes, group)
        group.stats.tokens, group.stats.sequences = group.tokens, group.sequences
    merged = {name: group.stats for group in groups for name in group.names}
    return {name: merged[name] for name in devices if name in merged}


@dataclass
class _Group:
    """Layers whose statistics become one object, `stats`: at first this process's part of it."""

    names: list[str]
    stats: InputStats
    device: torch.device
    width: int  # input columns; 0 if no process saw a token
    tokens: int  # on all processes together, as are the sequences
    sequences: int
    samples: tuple[int, ...]  # number of samples by rank


def _groups(
    processes: Processes,
    stats: Mapping[str, InputStats],
    devices: Mapping[str, torch.device],
    needs: frozenset[str],
    sequences: int,
) -> list[_Group]:
    """Returns the groups of layers that become one object, in the same order on all processes."""
    own = list({id(stats[name]): stats[name] for name in devices if name in stats}.values())
    number = {id(part): index for index, part in enumerate(own)}
    everyone = processes.gather(
        {
            "sequences": sequences,
            "which": [number[id(stats[name])] if name in stats else None for name in devices],
            "objects": [[part.tokens, part.width, part.sample_count] for part in own],
        }
    )
    shared: dict[tuple[int | None, ...], list[str]] = {}
    for name, *which in zip(devices, *(theirs["which"] for theirs in everyone), strict=True):
        if any(index is not None for index in which):
            shared.setdefault(tuple(which), []).append(name)
    groups, used = [], set()
    for key, names in shared.items():
        facts = [[0, 0, 0] if i is None else theirs["objects"][i] for theirs, i in zip(everyone, key, strict=True)]
        tokens, widths, samples = zip(*facts, strict=True)
        index = key[processes.rank]
        part = InputStats(needs) if index is None else own[index]
        if index in used:  # layers that shared their input here, but not on another process
            part = copy.deepcopy(part)
        used.add(index)
        total = sum(theirs["sequences"] for theirs in everyone)
        groups.append(_Group(names, part, devices[names[0]], max(widths), sum(tokens), total, samples))
    return groups


def _average_squares(processes: Processes, groups: Sequence[_Group]) -> None:
    """Turns means over each process's sequences into means over all; one reduction, for there may be hundreds of experts."""
    groups = [group for group in groups if group.width]
    if not groups:
        return
    parts = [
        torch.zeros(group.width, dtype=torch.float64)
        if group.stats.mean_sq is None
        else group.stats.mean_sq.to("cpu", torch.float64) * group.stats.sequences
        for group in groups
    ]
    total = processes.sum(torch.cat(parts))
    for group, squares in zip(groups, total.split([group.width for group in groups]), strict=True):
        group.stats.mean_sq = (squares / group.sequences).to(group.device, torch.float32)


def _join_samples(processes: Processes, group: _Group) -> None:
    """Replaces a group's samples by those of all processes, by rank."""
    mine = group.stats.samples if group.stats.sample_count else torch.empty(0, group.width, device=group.device)
    group.stats.replace_samples(
        [
            processes.broadcast(mine if rank == processes.rank else mine.new_empty(count, group.width), rank)
            for rank, count in enumerate(group.samples)
            if count
        ]
    )
