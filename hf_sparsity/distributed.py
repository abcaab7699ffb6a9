"""One run shared by several processes: who does what, and how they tell each other.

Every process holds the model (or streams it from disk) and walks through the same blocks. The calibration
sequences are split between them, and so are the layers of a block while they are solved; statistics and
new weights are brought together here, so that all walk on with the same model. Everything that knows
`torch.distributed` is in this file. With one process nothing here does, or costs, anything.

What the processes tell each other is tensors and JSON: nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from .algorithm import Layer
from .core.stats import GRAM, SAMPLES, TILE, InputStats
from .model.inference import Batch

T = TypeVar("T")

STOPPED = "another process of this run has stopped (see its message); start the same command again to go on"
# A process that dies is noticed at once; one that is only late (a large layer, a large model to save) is waited for.
PATIENCE = timedelta(hours=6)
STRIPE = 2 * TILE  # rows of a Gram matrix that are copied at a time to be summed: few enough for the heap to reuse


@dataclass(frozen=True)
class Processes:
    """The processes of this run: this one's `rank`, and their `count`.

    Apart from `share` and the properties, every method is a meeting point: all processes must call it, in the
    same order. A process that ends with an error releases those that wait, which then raise `RuntimeError`.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """The processes launched with this one (`accelerate launch`, `torchrun`), joined if not done yet; else it alone."""
        launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if not dist.is_available() or not (launched or dist.is_initialized()):
            return cls()
        if not dist.is_initialized():
            cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
            PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=PATIENCE)
        if not dist.is_initialized():  # the state was made earlier, by someone who did not say that it is the CPU's
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def hide_bars(self) -> bool | None:
        """For `tqdm(disable=...)`: progress shows on the main process only, and there only on a terminal."""
        return None if self.main else True

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: a contiguous stretch of them, lengths differing by one at most.

        So the shares of all processes, by rank, are the items in their order. Of fewer items than processes
        some get none.
        """
        start, stop = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(items[start:stop])

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.gather(None)

    def gather(self, mine: Any) -> list[Any]:
        """What each process passed, by rank: plain JSON types, small, that come back as JSON gives them."""
        if self.count == 1:
            return [mine]
        device = _carried(torch.device("cpu"))
        data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        length = torch.tensor([data.numel()], device=device)
        lengths = [torch.zeros_like(length) for _ in range(self.count)]
        with _meeting():
            dist.all_gather(lengths, length)
        padded = torch.zeros(int(torch.cat(lengths).max()), dtype=torch.uint8, device=device)
        padded[: data.numel()] = data
        all_data = [torch.zeros_like(padded) for _ in range(self.count)]
        with _meeting():
            dist.all_gather(all_data, padded)
        return [json.loads(one[: int(n)].cpu().numpy().tobytes()) for one, n in zip(all_data, lengths, strict=True)]

    def agree(self, name: str, value: Any) -> None:
        """Checks that all processes have the same `value`, of JSON types; `ValueError` on all of them if not."""
        if self.count == 1:
            return
        values = [json.dumps(one, sort_keys=True) for one in self.gather(value)]
        if len(set(values)) > 1:
            said = "; ".join(f"process {rank} has {one[:200]}" for rank, one in enumerate(values))
            raise ValueError(f"the processes of this run differ in {name}: {said}. Give all of them the same")

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, of equal shapes and dtypes, with the same bits on each process."""
        if self.count == 1:
            return values
        total = values.to(_carried(values.device), copy=True).contiguous()
        with _meeting():
            dist.all_reduce(total)
        return total.to(values.device)

    def merge_stats(
        self,
        stats: Mapping[str, InputStats],
        devices: Mapping[str, torch.device],
        *,
        needs: frozenset[str],
        sequences: int,
    ) -> dict[str, InputStats]:
        """Statistics over the sequences of all processes, from each one's own; the objects passed in are used up.

        They equal those of one process that saw all sequences, up to the rounding of float32, with the same bits on
        all processes; `samples` are in calibration order if the sequences were split by `share`. Layers share one
        object if they do on every process. A layer that some process never saw (an expert) is there if any saw it.

        Args:
            stats: closed, by layer; layers that no token reached may be missing.
            devices: where the statistics of each layer belong; names all layers, in the same order on all processes.
            needs: what was collected, the same on all processes.
            sequences: how many this process saw (0 if none), with which its stats were closed.
        """
        if self.count == 1:
            return dict(stats)
        groups = self._groups(stats, devices, needs, sequences)
        if GRAM in needs:
            for group in groups:
                self._sum_gram(group)
        else:
            self._average_squares(groups)
        for group in groups:
            if SAMPLES in needs:
                self._join_samples(group)
            group.stats.tokens, group.stats.sequences = group.tokens, group.sequences
        merged = {name: group.stats for group in groups for name in group.names}
        return {name: merged[name] for name in devices if name in merged}

    def exchange(
        self, mine: dict[str, Tensor], owners: Mapping[str, int], like: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields each layer's name and new weight `[out, in]`, from its owner, with the same bits on all processes.

        All processes must take all of them. Weights come one at a time, in the order of `like`.

        Args:
            mine: the weights that this process owns; each is taken out when it is its turn.
            owners: the rank that has the new weight of each layer.
            like: a tensor of the shape, dtype and device of each layer, in the same order on all processes.
        """
        for name, old in like.items():
            if owners[name] == self.rank:
                value = mine.pop(name)
                if value.shape != old.shape or value.dtype != old.dtype:
                    raise ValueError(f"{name}: {value.dtype} {list(value.shape)}, not {old.dtype} {list(old.shape)}")
            else:
                value = torch.empty(old.shape, dtype=old.dtype, device=old.device)
            yield name, self._broadcast(value, owners[name])
            del value

    def _groups(
        self,
        stats: Mapping[str, InputStats],
        devices: Mapping[str, torch.device],
        needs: frozenset[str],
        sequences: int,
    ) -> list[_Group]:
        """What becomes one object, in the same order on all processes, with this process's part of it."""
        own = list({id(stats[name]): stats[name] for name in devices if name in stats}.values())
        number = {id(one): index for index, one in enumerate(own)}
        told = self.gather(
            {
                "sequences": sequences,
                "which": [number[id(stats[name])] if name in stats else None for name in devices],
                "objects": [[one.tokens, _width(one), sum(map(len, one._samples))] for one in own],
            }
        )
        shared: dict[tuple[int | None, ...], list[str]] = {}
        for name, *which in zip(devices, *(one["which"] for one in told), strict=True):
            if any(index is not None for index in which):
                shared.setdefault(tuple(which), []).append(name)
        groups, used = [], set()
        for key, names in shared.items():
            facts = [[0, 0, 0] if i is None else one["objects"][i] for one, i in zip(told, key, strict=True)]
            tokens, widths, samples = zip(*facts, strict=True)
            index = key[self.rank]
            part = InputStats(needs) if index is None else own[index]
            if index in used:  # layers that shared their input here, but not on another process
                part = copy.deepcopy(part)
            used.add(index)
            total = sum(one["sequences"] for one in told)
            groups.append(_Group(names, part, devices[names[0]], max(widths), sum(tokens), total, samples))
        return groups

    def _sum_gram(self, group: _Group) -> None:
        """In place, in stripes of rows, without most of what is below the diagonal (which is not filled)."""
        if not group.width:
            return
        if group.stats._gram is None:
            group.stats._gram = torch.zeros(group.width, group.width, device=group.device)
        gram, group.stats._mirrored = group.stats._gram, False
        for start in range(0, group.width, STRIPE):
            # A tile on the diagonal is filled below it too, but no tile reaches further back than its own side.
            stripe = gram[start : start + STRIPE, max(0, start - TILE) :]
            stripe.copy_(self.sum(stripe))

    def _average_squares(self, groups: Sequence[_Group]) -> None:
        """Means over the sequences of each process -> over all; one reduction, for there may be hundreds of experts."""
        groups = [group for group in groups if group.width]
        if not groups:
            return
        parts = [
            torch.zeros(group.width, dtype=torch.float64)
            if group.stats.mean_sq is None
            else group.stats.mean_sq.to("cpu", torch.float64) * group.stats.sequences
            for group in groups
        ]
        total = self.sum(torch.cat(parts))
        for group, squares in zip(groups, total.split([group.width for group in groups]), strict=True):
            group.stats.mean_sq = (squares / group.sequences).to(group.device, torch.float32)

    def _join_samples(self, group: _Group) -> None:
        own = group.stats._samples
        mine = torch.cat(own) if own else torch.empty(0, group.width, device=group.device)
        group.stats._samples = [
            self._broadcast(mine if rank == self.rank else mine.new_empty(count, group.width), rank)
            for rank, count in enumerate(group.samples)
            if count
        ]

    def _broadcast(self, value: Tensor, source: int) -> Tensor:
        """The `value` of process `source`, bit for bit; on the others it is overwritten."""
        if self.count == 1:
            return value
        sent = value.contiguous().to(_carried(value.device))
        with _meeting():
            dist.broadcast(sent.view(torch.uint8), source)
        return sent.to(value.device)


@dataclass
class _Group:
    """Layers whose statistics become one object, `stats`: at first this process's part of it."""

    names: list[str]
    stats: InputStats
    device: torch.device
    width: int  # of the inputs; 0 if no process saw a token
    tokens: int  # on all processes, as what follows
    sequences: int
    samples: tuple[int, ...]  # how many each process has


def owners(groups: Sequence[Sequence[Layer]], count: int) -> list[int]:
    """Which of `count` processes solves each group of layers that share their inputs; the same on all of them.

    By the cost of SparseGPT, `out·in²` for each layer and `in³/3` for the Gram matrix that a group has in common:
    the most expensive first, each to the process that has least to do.
    """
    shapes = [[tuple(layer.weight.shape) for layer in group] for group in groups]
    costs = [sum(o * i**2 for o, i in group) + group[0][1] ** 3 // 3 for group in shapes]
    load, owner = [0] * count, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += costs[index]
    return owner


def _width(stats: InputStats) -> int:
    """Of the inputs; 0 if no token came."""
    kept = stats._gram if stats.mean_sq is None else stats.mean_sq
    return 0 if kept is None else kept.shape[-1]


def _carried(device: torch.device) -> torch.device:
    """`device`, or where a tensor from there must go for the processes' backend to carry it (NCCL: to this one's GPU)."""
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    if device.type in kinds or "cpu" in kinds:
        return device if device.type in kinds else torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


@contextmanager
def _meeting() -> Iterator[None]:
    """Around a collective operation, which fails when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(STOPPED) from error


def share(data: list[Batch], processes: Processes) -> list[Batch]:
    """This process's batches; `ValueError` when there are fewer than processes."""
    if data and len(data) < processes.count:
        raise ValueError(
            f"{len(data)} calibration batches cannot be shared by {processes.count} processes; give more sequences"
        )
    return processes.share(data)


def sum_over_processes(total: Tensor) -> None:
    """Replaces a tensor by its sum over all processes of the launch, in place; with one process nothing happens."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
