"""How a pass over a model is carried out: by which processes, within which memory, on top of what is done already."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.journal import Journal
from ..core.stats import InputStats
from ..distributed import Processes
from ..model.devices import accelerators, free_memory
from ..model.layers import Block, ModelLayers
from ..progress import Bar
from .first_pass import merged_order
from .merge import merge_stats
from .spill import Spill

Step = TypeVar("Step", bound=Any)

SHARE = 8  # one of so many parts of an accelerator's free memory may hold the inputs of waiting batches


@dataclass(frozen=True)
class PassOptions:
    """Options of a pass through the model.

    Args:
        processes: those that share the work.
        hidden_limit: bytes of waiting batches' inputs that stay in memory; None for all.
        journal: the record of a pruning pass that can be interrupted.
    """

    processes: Processes = field(default_factory=Processes)
    hidden_limit: int | None = None
    journal: Journal | None = None

    def has_finished(self, block: Block) -> bool:
        """Returns whether an earlier, interrupted run has pruned the block."""
        return self.journal is not None and self.journal.finished(block.name)

    def common_order(self, order: Sequence[int]) -> list[int]:
        """Returns the order in which all processes visit the blocks, from that in which the batches of each do."""
        return merged_order(self.processes.gather(list(order)))

    def merge(
        self, stats: Mapping[str, InputStats], block: Block, needs: frozenset[str], sequences: int
    ) -> dict[str, InputStats]:
        """Returns a block's statistics over all processes, from those over the `sequences` of this one."""
        devices = {name: weight.read().device for name, weight in block.weights.items()}
        return merge_stats(self.processes, stats, devices, needs=needs, sequences=sequences)

    @contextmanager
    def spilling(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> Iterator[Spill | None]:
        """Gives a place for inputs beyond the limit on disk, and for those of accelerators on the host, closed afterwards.

        None for a model on the CPU without a limit. On accelerators, inputs of waiting batches take at most an eighth of
        what is free on the fullest of them.
        """
        devices = accelerators(model)
        if self.hidden_limit is None and not devices:
            yield None
            return
        inputs = (v for batch in batches for v in batch.values() if isinstance(v, Tensor))
        folder = self.journal.folder if self.journal else None
        shared = itertools.chain(model.parameters(), model.buffers(), inputs)
        room = min((free_memory(device) or 0 for device in devices), default=0) // SHARE
        spill = Spill(self.hidden_limit, shared, folder, room=room if devices else None)
        try:
            yield spill
        finally:
            spill.close()


class Progress:
    """A bar of the blocks of one pass, shown on the main process: what is left, and tokens a second."""

    def __init__(
        self, title: str, model_layers: ModelLayers, run: PassOptions, batches: Sequence[Mapping[str, Any]] = ()
    ):
        """`batches`: those that pass through every block; without any no speed is shown."""
        names = [block.name for block in model_layers.blocks if block.weights]
        self._done = sum(map(run.journal.finished, names)) if run.journal else 0
        self._tokens = sum(batch.get("input_ids", next(iter(batch.values()))).numel() for batch in batches)
        self._title, self._total, self._shown = title, len(names), run.processes.main
        self._bar: Bar | None = None
        self._speed = ""

    def over(self, stream: Iterator[Step]) -> Iterator[Step]:
        """Yields what the stream yields, a step of the bar for each."""
        with Bar(self._title, self._total, "block", done=self._done, shown=self._shown) as bar:
            self._bar = bar
            start = time.perf_counter()
            for block in stream:
                yield block
                bar.step()
                if self._tokens:
                    seconds = time.perf_counter() - start
                    self._speed = f"{self._tokens * (bar.count - self._done) / seconds:.0f} tokens/s"
                bar.say(self._speed)
        self._bar = None

    def say(self, text: str) -> None:
        """Shows how far the work on the current block is."""
        if self._bar is not None:
            self._bar.say(", ".join(filter(None, (text, self._speed))))
