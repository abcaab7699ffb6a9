"""How a pass over a model is carried out: by which processes, within which memory, on top of what is done already."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoint.journal import Journal
from ..core.stats import InputStats
from ..distributed import Processes
from ..model.layers import Block, ModelLayers
from .spill import Spill

Step = TypeVar("Step", bound=Any)


@dataclass(frozen=True)
class PassOptions:
    """`hidden_limit`: bytes of waiting batches' inputs that stay in memory, None for all. `journal`: of a pruning pass."""

    processes: Processes = field(default_factory=Processes)
    hidden_limit: int | None = None
    journal: Journal | None = None

    def has_finished(self, block: Block) -> bool:
        """Whether an earlier, interrupted run has pruned the block."""
        return self.journal is not None and self.journal.finished(block.name)

    def merge(
        self, stats: Mapping[str, InputStats], block: Block, needs: frozenset[str], sequences: int
    ) -> dict[str, InputStats]:
        """A block's statistics over the `sequences` of this process -> over those of all."""
        devices = {name: weight.read().device for name, weight in block.weights.items()}
        return self.processes.merge_stats(stats, devices, needs=needs, sequences=sequences)

    @contextmanager
    def spilling(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> Iterator[Spill | None]:
        """A place on disk for inputs beyond the limit, gone afterwards."""
        if self.hidden_limit is None:
            yield None
            return
        given = (v for batch in batches for v in batch.values() if isinstance(v, Tensor))
        folder = self.journal.folder if self.journal else None
        spill = Spill(self.hidden_limit, itertools.chain(model.parameters(), model.buffers(), given), folder)
        try:
            yield spill
        finally:
            spill.close()


def progress(
    stream: Iterator[Step],
    model_layers: ModelLayers,
    title: str,
    run: PassOptions,
    batches: Sequence[Mapping[str, Any]],
) -> Iterator[Step]:
    """The stream, with a bar of its blocks on the main process: what is left, and tokens a second."""
    names = [block.name for block in model_layers.blocks if block.weights]
    done = sum(map(run.journal.finished, names)) if run.journal else 0
    tokens = sum(batch.get("input_ids", next(iter(batch.values()))).numel() for batch in batches)
    with tqdm(
        total=len(names), initial=done, desc=title, unit="block", disable=run.processes.hide_bars, leave=False
    ) as bar:
        start, speed = time.perf_counter(), ""
        for block in stream:
            block.tell = lambda text, speed=speed: bar.set_postfix_str(", ".join(filter(None, (text, speed))))
            yield block
            bar.update()
            if tokens:
                speed = f"{tokens * (bar.n - done) / (time.perf_counter() - start):.0f} tokens/s"
            bar.set_postfix_str(speed)
