"""Where an interrupted pruning pass goes on: at the last block whose inputs are on disk, where the architecture allows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.journal import Journal
from ..distributed import Processes
from ..model.layers import Block
from ..model.offload import onload
from .lockstep import Arrival

logger = logging.getLogger(__name__)


def visit_to_resume_at(
    journal: Journal | None,
    processes: Processes,
    blocks: Sequence[Block],
    number: int,
    walk_pair: Callable[[], Generator[Arrival]],
) -> int:
    """Returns the number of the visit from which a pass goes on; 0 if it has to begin at the first block.

    Later visits qualify when what a block gets depends on nothing but the output of the block before and the batch.
    That is tried on one batch, that of this `number`, which `walk_pair` lets walk twice: beside its true walk, one that begins with
    the stored output must come to every later block with the same arguments. All processes return the same.
    """
    if journal is None:
        return 0
    start = min(processes.gather(journal.hidden.start))
    if start and not _arrive_alike(start, journal, blocks, number, walk_pair):
        start = 0
    return min(processes.gather(start))


def _arrive_alike(
    start: int, journal: Journal, blocks: Sequence[Block], number: int, walk_pair: Callable[[], Generator[Arrival]]
) -> bool:
    """Returns whether a walk that begins with the stored output equals the true walk from visit `start` on."""
    try:
        with closing(walk_pair()) as arrivals:
            for visit, arrival in enumerate(arrivals):
                if visit >= start and not _same(*arrival.calls):
                    return False
                if not arrival.waiting:
                    continue
                with onload(blocks[arrival.index].module):
                    output = arrival.run(0)
                arrival.finish(0, output)
                arrival.finish(1, journal.hidden.output(number, blank=visit < start - 1) if visit < start else output)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        logger.info("no way to go on from stored inputs (%s); the finished blocks are computed again", error)
        return False
    return True


def _same(first: Any, second: Any) -> bool:
    """Returns whether nested arguments hold equal tensors; what is neither tensor nor container counts as equal."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second)
