"""One run shared by several processes: which process does what, and how results are exchanged.

Every process holds the model (or streams it from disk) and walks through the same blocks. The calibration
sequences are split between them, and so are the layers of a block while they are solved; statistics and
new weights are brought together here, so that all walk on with the same model. Everything that knows
`torch.distributed` is in this file. With one process nothing here does, or costs, anything.

Processes send each other tensors and JSON only: nothing is unpickled.
"""

from __future__ import annotations

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
from .model.inference import Batch

T = TypeVar("T")

STOPPED = "another process of this run has stopped (see its message); start the same command again to go on"
# The time to wait for a process that is late (a large layer, a large model to save); one that dies is noticed at once.
PATIENCE = timedelta(hours=6)


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
        """Returns the processes launched with this one (`accelerate launch`, `torchrun`), joining them if not done yet.

        Without a launch: this process alone.
        """
        launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if not dist.is_available() or not (launched or dist.is_initialized()):
            return cls()
        if not dist.is_initialized():
            cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
            PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=PATIENCE)
        if not dist.is_initialized():  # the state was made earlier, by code that did not say that it is the CPU's
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        """True on the one process that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Returns this process's items: a contiguous stretch, whose lengths differ by one at most between processes.

        The shares of all processes, by rank, are the items in their order. With fewer items than processes some
        shares are empty.
        """
        start, stop = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(items[start:stop])

    def wait(self) -> None:
        """Waits until all processes have called this."""
        self.gather(None)

    def gather(self, mine: Any) -> list[Any]:
        """Returns what each process passed, by rank: plain JSON types, small, as JSON gives them back."""
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
        return [json.loads(sent[: int(n)].cpu().numpy().tobytes()) for sent, n in zip(all_data, lengths, strict=True)]

    def agree(self, name: str, value: Any) -> None:
        """Raises ValueError on all processes unless they have the same `value`, of JSON types."""
        if self.count == 1:
            return
        values = [json.dumps(theirs, sort_keys=True) for theirs in self.gather(value)]
        if len(set(values)) > 1:
            differing = "; ".join(f"process {rank} has {theirs[:200]}" for rank, theirs in enumerate(values))
            raise ValueError(f"the processes of this run differ in {name}: {differing}. Give all of them the same")

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of all processes' `values`, of equal shapes and dtypes, with the same bits on each process."""
        if self.count == 1:
            return values
        total = values.to(_carried(values.device), copy=True).contiguous()
        with _meeting():
            dist.all_reduce(total)
        return total.to(values.device)

    def broadcast(self, value: Tensor, source: int) -> Tensor:
        """Returns the `value` of process `source`, bit for bit; the other processes' tensors may be overwritten."""
        if self.count == 1:
            return value
        sent = value.contiguous().to(_carried(value.device))
        with _meeting():
            dist.broadcast(sent.view(torch.uint8), source)
        return sent.to(value.device)

    def exchange(
        self, mine: dict[str, Tensor], owners: Mapping[str, int], like: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields each layer's name and new weight `[out, in]`, from its owner, with the same bits on all processes.

        All processes must take all of them. Weights come one at a time, in the order of `like`.

        Args:
            mine: the weights that this process owns; each is removed when its turn comes.
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
            yield name, self.broadcast(value, owners[name])
            del value


def owners(groups: Sequence[Sequence[Layer]], count: int) -> list[int]:
    """Returns the rank that solves each group of layers that share their inputs; the same on all `count` processes.

    Costs are those of SparseGPT, `out·in²` for each layer and `in³/3` for the Gram matrix that a group has in
    common; the most expensive group first, each to the process that has least to do.
    """
    shapes = [[tuple(layer.weight.shape) for layer in group] for group in groups]
    costs = [sum(o * i**2 for o, i in group) + group[0][1] ** 3 // 3 for group in shapes]
    load, owner = [0] * count, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += costs[index]
    return owner


def _carried(device: torch.device) -> torch.device:
    """Returns where a tensor from `device` must be for the processes' backend to send it (NCCL: on this one's GPU)."""
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    if device.type in kinds or "cpu" in kinds:
        return device if device.type in kinds else torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


@contextmanager
def _meeting() -> Iterator[None]:
    """Turns the failure of a collective operation, which means that another process is gone, into our error."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(STOPPED) from error


def share(data: list[Batch], processes: Processes) -> list[Batch]:
    """Returns this process's batches; raises ValueError when there are fewer batches than processes."""
    if data and len(data) < processes.count:
        raise ValueError(
            f"{len(data)} calibration batches cannot be shared by {processes.count} processes; give more sequences"
        )
    return processes.share(data)


def sum_over_processes(total: Tensor) -> None:
    """Replaces a tensor by its sum over all processes of the launch, in place; with one process nothing happens."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
