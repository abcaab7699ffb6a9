"""Run a model block by block with real inputs, whatever the architecture.

The model's own forward drives. Each calibration batch runs `drive(**batch)` in a thread of its own;
every block's `forward` is replaced by one that hands its arguments to the driver and sleeps. When
all batches stand at the same block, the driver has every input that the block will really get, with
its own masks, rotary tables and cross-layer state. It runs the block, gives each thread its output,
and that thread walks on to the next block. So nothing is recorded from one block and replayed at another,
which is silently wrong for models whose blocks differ (Gemma, gpt-oss, sliding windows).

Exactly one thread is awake at any time: the threads are coroutines, not parallelism. Blocks run in
the driver's thread only, because grad mode and autocast are per thread and a BLAS keeps scratch
memory for each thread that used it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..model.inference import replaced_forwards
from .halving import Around, Halving
from .spill import Spill


class _Stop(BaseException):
    """Ends a waiting thread; not an Exception, so that no model code swallows it."""


@dataclass
class Arrival:
    """A visit of batches to block `index`; the driver runs the block on each and lets it go, in any order.

    `calls[b]`: the arguments with which batch b calls the block, empty once it has gone, or if it does not stand there.
    """

    index: int
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    _forward: Callable[..., Any]
    _go: Callable[[int, Any], None]
    _spill: Spill | None = None
    _halving: Halving = field(default_factory=Halving)

    @property
    def waiting(self) -> list[int]:
        """The numbers of the batches that stand at the block."""
        return [number for number, (args, kwargs) in enumerate(self.calls) if args or kwargs]

    def arguments(self, batch: int) -> dict[str, Any]:
        """Returns the arguments with which a batch calls the block, by name, also those that are given by position."""
        args, kwargs = self.calls[batch]
        try:
            return {**inspect.signature(self._forward).bind_partial(*args, **kwargs).arguments, **kwargs}
        except (TypeError, ValueError):  # a forward without a signature
            return dict(kwargs)

    def run(self, batch: int, *, stay: bool = True, around: Around | None = None, sequences: int | None = None) -> Any:
        """Returns the block's output on one batch, computed in the driver's thread without gradients.

        Where the device is full, in parts; see `Halving.run` also for `around` and `sequences`.
        `stay`: whether the batch waits on; otherwise `finish` follows.
        """
        if self._spill:
            self._spill.fetch(batch)
        with torch.no_grad():
            output = self._halving.run(self._forward, batch, self.calls[batch], around, sequences)
        if self._spill and stay:
            self._spill.rest(batch)
        return output

    def finish(self, batch: int, output: Any) -> None:
        """Gives a batch its output; it lets go of its inputs and walks to its next block at once."""
        if self._spill:
            self._spill.leave(batch)
        self.calls[batch] = ((), {})
        self._go(batch, output)


class _Worker:
    """The thread of one batch: `call` holds the block it stands at with its arguments, None while it walks."""

    def __init__(self) -> None:
        self.wake = threading.Semaphore(0)
        self.call: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False


class _Walk:
    """The threads of all batches, of which one is awake at a time or none.

    `back` is released by a thread whenever it falls asleep at a block or ends.
    """

    def __init__(self, drive: Callable[..., Any], batches: Sequence[Mapping[str, Any]], spill: Spill | None):
        self.workers = [_Worker() for _ in batches]
        self.spill = spill
        self._drive = drive
        self._back = threading.Semaphore(0)
        self._own = threading.local()  # the worker of each thread
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=pair, daemon=True)
            for pair in zip(self.workers, batches, strict=True)
        ]

    def suspended(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward for block `index` that hands its arguments to the driver and waits for the output."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            worker = getattr(self._own, "worker", None)
            if worker is None:
                return original(*args, **kwargs)
            worker.call = (index, args, kwargs)
            del args, kwargs  # the driver frees the inputs as soon as they are used
            self._back.release()
            worker.wake.acquire()
            if self._stopping:
                raise _Stop
            result, worker.result = worker.result, None
            return result

        return forward

    def _work(self, worker: _Worker, batch: Mapping[str, Any]) -> None:
        """Runs in the thread of a batch."""
        self._own.worker = worker
        worker.wake.acquire()
        try:
            if not self._stopping:
                with torch.no_grad():
                    self._drive(**batch)
        except _Stop:
            pass
        except BaseException as error:
            worker.error = error
        finally:
            worker.done = True
            self._back.release()

    def start(self) -> None:
        """Lets every batch walk to its first block."""
        for thread in self._threads:
            thread.start()
        for number in range(len(self.workers)):
            self.advance(number)

    def advance(self, number: int) -> None:
        """Lets a batch walk to its next block, or to its end."""
        worker = self.workers[number]
        worker.wake.release()
        self._back.acquire()
        if worker.error is not None:
            raise worker.error
        if self.spill and worker.call:
            self.spill.arrive(number, worker.call[1:])

    def first_blocks(self) -> Iterator[int]:
        """Yields the first block, in definition order, at which a batch stands, until all batches have ended."""
        while standing := [worker.call[0] for worker in self.workers if worker.call]:
            yield min(standing)

    def take(self, index: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Returns the arguments of each batch that stands at a block, empty ones for the others."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for worker in self.workers:
            call, here = worker.call, worker.call is not None and worker.call[0] == index
            calls.append(call[1:] if call is not None and here else ((), {}))
            if here:
                worker.call = None
        return calls

    def go(self, number: int, output: Any) -> None:
        """Gives a batch the output of the block it stands at, and lets it walk on."""
        worker = self.workers[number]
        if worker.call is not None or worker.done:
            raise RuntimeError(f"batch {number} was let go twice at one block")
        worker.result = output
        del output
        self.advance(number)

    def stop(self) -> None:
        """Ends the threads of all batches."""
        self._stopping = True
        for worker, thread in zip(self.workers, self._threads, strict=True):
            if thread.ident is not None:
                worker.wake.release()
                thread.join()


def lockstep(
    drive: Callable[..., Any],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Any]],
    spill: Spill | None = None,
    order: Sequence[int] | None = None,
) -> Generator[Arrival]:
    """Yields an `Arrival` each time batches stand at a block and none can still come to it.

    For each waiting batch the consumer has called `arrival.finish` with its output when it resumes. With `spill`, the
    inputs of waiting batches may lie on disk.

    Args:
        order: the indices of the blocks in the order of their visits; one arrival is yielded for each, also if no batch
            stands there (batches without images do not visit a vision tower). None: batches at the first block in
            definition order go first, so a block may be visited by some batches and later by others.

    Raises:
        RuntimeError: a batch visits blocks in another order, or the consumer has kept one back.
        Exception: whatever the model's forward raises.
    """
    walk = _Walk(drive, batches, spill)
    originals = [block.forward for block in blocks]
    halving = Halving(spill.make_room if spill else None)
    with replaced_forwards(blocks, [walk.suspended(*pair) for pair in enumerate(originals)]):
        try:
            walk.start()
            for index in order if order is not None else walk.first_blocks():
                arrival = Arrival(index, walk.take(index), originals[index], walk.go, spill, halving)
                yield arrival
                if arrival.waiting:
                    raise RuntimeError(f"batches {arrival.waiting} were not let go from block {index}")
                del arrival
            if not all(worker.done for worker in walk.workers):
                raise RuntimeError(
                    "calibration batches visit the model's blocks in different orders; give batches of one kind"
                )
        finally:
            walk.stop()
