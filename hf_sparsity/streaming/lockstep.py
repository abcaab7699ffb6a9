"""Run a model block by block with real inputs, whatever the architecture.

The model's own forward drives. Each calibration batch runs `drive(**batch)` in a thread of its own;
every block's `forward` is replaced by one that hands its arguments to the driver and sleeps. When
all batches stand at the same block, the driver has every input that the block will really get, with
its own masks, rotary tables and cross-layer state. It runs the block, gives each thread its output,
and that one walks on to the next block. So nothing is recorded from one block and replayed at another,
which is silently wrong for models whose blocks differ (Gemma, gpt-oss, sliding windows).

Exactly one thread is awake at any time: the threads are coroutines, not parallelism. Blocks run in
the driver's thread only, because grad mode and autocast are per thread and a BLAS keeps scratch
memory for each thread that used it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .spill import Spill


class _Stop(BaseException):
    """Ends a waiting thread; not an Exception, so that no model code swallows it."""


@dataclass
class Arrival:
    """All batches stand at block `index`; the driver runs the block on each and lets it go, in any order.

    `calls[b]`: the arguments with which batch b calls the block, empty once it has gone.
    """

    index: int
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    _forward: Callable[..., Any]
    _go: Callable[[int, Any], None]
    _spill: Spill | None = None

    def run(self, batch: int, *, stay: bool = True) -> Any:
        """The block's output on one batch, in the driver's thread, without gradients.

        `stay`: whether the batch waits on; otherwise `finish` follows.
        """
        if self._spill:
            self._spill.fetch(batch)
        args, kwargs = self.calls[batch]
        with torch.no_grad():
            output = self._forward(*args, **kwargs)
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
    def __init__(self) -> None:
        self.wake = threading.Semaphore(0)
        self.call: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False


def lockstep(
    drive: Callable[..., Any],
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Any]],
    spill: Spill | None = None,
) -> Generator[Arrival]:
    """Yields an `Arrival` each time all batches stand at a block.

    For each batch the consumer has called `arrival.finish` with its output when it resumes. With `spill`, the
    inputs of waiting batches may lie on disk.

    Raises whatever the model's forward raises, and `RuntimeError` when batches take different paths.
    """
    workers = [_Worker() for _ in batches]
    back = threading.Semaphore(0)
    mine = threading.local()
    stopping = False
    originals = [block.forward for block in blocks]

    def suspended(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            worker = getattr(mine, "worker", None)
            if worker is None:
                return originals[index](*args, **kwargs)
            worker.call = (index, args, kwargs)
            del args, kwargs  # the driver frees the inputs as soon as they are used
            back.release()
            worker.wake.acquire()
            if stopping:
                raise _Stop
            result, worker.result = worker.result, None
            return result

        return forward

    def work(worker: _Worker, batch: Mapping[str, Any]) -> None:
        mine.worker = worker
        worker.wake.acquire()
        try:
            if not stopping:
                with torch.no_grad():
                    drive(**batch)
        except _Stop:
            pass
        except BaseException as error:
            worker.error = error
        finally:
            worker.done = True
            back.release()

    def advance(number: int) -> None:
        """Lets a batch walk to its next block, or to its end."""
        workers[number].wake.release()
        back.acquire()
        if (error := workers[number].error) is not None:
            raise error
        call = workers[number].call
        if spill and call:
            spill.arrive(number, call[1:])

    def go(number: int, output: Any) -> None:
        worker = workers[number]
        if worker.call is not None or worker.done:
            raise RuntimeError(f"batch {number} was let go twice at one block")
        worker.result = output
        del output
        advance(number)

    own = ["forward" in block.__dict__ for block in blocks]  # accelerate's hooks live there too
    threads = [threading.Thread(target=work, args=(w, b), daemon=True) for w, b in zip(workers, batches, strict=True)]
    for index, block in enumerate(blocks):
        block.forward = suspended(index)
    try:
        for thread in threads:
            thread.start()
        for number in range(len(workers)):
            advance(number)
        while not all(worker.done for worker in workers):
            if any(worker.done for worker in workers) or len({w.call[0] for w in workers if w.call}) != 1:
                raise RuntimeError(
                    "calibration batches take different paths through the model; give batches of one kind"
                )
            calls = [worker.call for worker in workers if worker.call]
            index = calls[0][0]
            arrival = Arrival(index, [(args, kwargs) for _, args, kwargs in calls], originals[index], go, spill)
            del calls
            for worker in workers:
                worker.call = None
            yield arrival
            if waiting := [n for n, worker in enumerate(workers) if worker.call is None and not worker.done]:
                raise RuntimeError(f"batches {waiting} were not let go from block {index}")
            del arrival
    finally:
        stopping = True
        for block, original, owned in zip(blocks, originals, own, strict=True):
            if owned:
                block.forward = original
            else:
                del block.forward
        for worker, thread in zip(workers, threads, strict=True):
            if thread.ident is not None:
                worker.wake.release()
                thread.join()
