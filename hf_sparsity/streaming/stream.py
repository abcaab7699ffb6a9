"""Walk the model block by block with real inputs; yield what the algorithms see.

`stream_blocks` is the one loop over a model. While it is suspended at a block, that block's weights
are on its device and `layers` hold the statistics of the inputs it really gets. When it resumes,
the (perhaps rewritten) block computes the inputs of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Layer
from ..checkpoint.system import release_memory
from ..core.stats import InputStats
from ..model.inference import Batch, prepared
from ..model.layers import Block, ModelLayers, Weight, is_of_text
from ..model.masked import masked
from ..model.offload import Onloaded, onload
from ..model.precision import lent_precision
from .first_pass import first_pass
from .forward import drive, padding
from .halving import Around
from .lockstep import Arrival, lockstep
from .observer import Collector, Enough
from .operands import Operands
from .resume import visit_to_resume_at
from .run import PassOptions
from .spill import Spill
from .twin_walk import TwinWalk


@dataclass
class StreamedBlock:
    """One block while the stream is suspended at it.

    `layers`: its layers by name, weights on their device and not to be modified. `write` replaces one
    weight; `mask` makes the block compute as if a layer were pruned, this once, writing nothing.
    `unseen`: layers without statistics whose inputs could not be observed -> the reason.
    `twins`: the walks of a reconstruction, if asked for; the dense ones must go on before any `write`.
    """

    index: int
    name: str
    layers: dict[str, Layer]
    total: int
    _weights: dict[str, Weight] = field(repr=False)
    _onloaded: Onloaded = field(repr=False)
    unseen: Mapping[str, str] = field(default_factory=dict, repr=False)
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    twins: TwinWalk | None = field(default=None, repr=False)
    _spill: Spill | None = field(default=None, repr=False)

    def write(self, name: str, value: Tensor) -> None:
        """Replaces a layer's weight, `value` `[out, in]`."""
        self._onloaded.write(self._weights[name], value)

    def make_room(self) -> bool:
        """Lets the inputs of waiting batches leave the block's device; returns whether any did."""
        return self._spill is not None and self._spill.make_room()

    def mask(self, name: str, mask: Tensor) -> None:
        """Masks a layer (True = kept, `[out, in]`) while the inputs of the next block are computed."""
        self.masks[name] = mask


def stream_blocks(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    batches: Sequence[Batch],
    needs: frozenset[str],
    *,
    rewrites: bool,
    after_last: Callable[[Batch, Any], None] | None = None,
    run: PassOptions | None = None,
    only: Container[int] | None = None,
    twins: bool = False,
) -> Iterator[StreamedBlock]:
    """Yields every block with prunable weights once, in the order of execution, then those that never ran.

    Args:
        model_layers: from `find_layers`.
        batches: from `prepare_batches`; with several processes, this one's share. Empty: no forward pass at all,
            blocks in definition order, no statistics.
        needs: the facts of `core/stats.py` to collect, over all processes' batches; empty for none.
        rewrites: whether the caller may `write` or `mask`. If not, each block runs once instead of twice.
        after_last: called with each batch and the model's output for it; without it no head is computed.
        run: the processes that share the work, where inputs spill, and what is finished already.
        only: without batches, the indices of the blocks that are wanted.
        twins: let every batch walk a second time, behind the dense blocks; the caller runs it by `StreamedBlock.twins`.

    A block that the model runs several times in one pass gathers its statistics over all of them, in a
    dense pass of its own before the others, and is yielded once.

    Raises:
        ValueError: `twins` with a model that runs a block several times.
        RuntimeError: `twins`, and an interrupted run whose stored inputs are of no use.
    """
    run = run or PassOptions()
    if run.journal and all(run.has_finished(block) for block in model_layers.blocks if block.weights):
        return
    visited: list[int] = []
    unseen: dict[str, str] = {}
    if batches:
        with prepared(model), run.spilling(model, batches) as spill:
            visited = (run.journal.order if run.journal else None) or []
            if not visited:
                first = first_pass(model, model_layers, batches)
                visited, unseen = run.common_order(first.order), first.unseen
            if run.journal:
                run.journal.begin_pass(visited, len(batches) * (1 + twins))
            repeated = {index for index in visited if visited.count(index) > 1}
            if repeated and twins:
                name = model_layers.blocks[min(repeated)].name
                raise ValueError(f"{name} runs several times in one pass; such a model cannot be reconstructed")
            walk = _Pass(model, model_layers, batches, needs, run, spill, visited, twins)
            if repeated:
                yield from walk.gather(repeated)
            yield from walk.walk(repeated, rewrites=rewrites, after_last=after_last)
    for index, block in enumerate(model_layers.blocks):
        wanted = index not in visited and (only is None or index in only)
        if wanted and block.weights and not run.has_finished(block):
            with onload(block.module) as onloaded:
                yield _streamed(index, block, onloaded, {}, len(model_layers.blocks), unseen)
            if run.journal:
                run.journal.commit(None)


def _streamed(
    index: int,
    block: Block,
    onloaded: Onloaded,
    stats: Mapping[str, InputStats],
    total: int,
    unseen: Mapping[str, str],
) -> StreamedBlock:
    """Returns a block with its layers, which have the statistics that were collected."""
    layers = {name: Layer(name, weight.read(), stats.get(name)) for name, weight in block.weights.items()}
    return StreamedBlock(index, block.name, layers, total, block.weights, onloaded, unseen)


_NO_WAY_BACK = (
    "{} is pruned already, and the inputs that its dense version gave to the next block were not kept or are of no use in "
    "this architecture: an interrupted reconstruction cannot go on here. Start anew with overwrite=True (--overwrite)"
)


@dataclass(frozen=True)
class _Pass:
    """The lockstep passes over a model with inputs."""

    model: PreTrainedModel
    model_layers: ModelLayers
    batches: Sequence[Batch]
    needs: frozenset[str]
    run: PassOptions
    spill: Spill | None
    order: list[int]
    twins: bool = False

    @property
    def walks(self) -> Sequence[Batch]:
        """The batches that walk through the model; the dense ones come last."""
        return [*self.batches, *self.batches] if self.twins else self.batches

    def arrivals(self, after_last: Callable[[Batch, Any], None] | None = None) -> Generator[Arrival]:
        """Begins a walk of all batches through the model."""
        return lockstep(
            drive(self.model, after_last),
            [b.module for b in self.model_layers.blocks],
            self.walks,
            self.spill,
            self.order,
        )

    def walk(
        self,
        repeated: set[int],
        *,
        rewrites: bool,
        after_last: Callable[[Batch, Any], None] | None,
    ) -> Iterator[StreamedBlock]:
        """Yields each block that is not `repeated` at its visit."""
        journal, blocks = self.run.journal, self.model_layers.blocks
        richest = max(range(len(self.batches)), key=lambda number: len(self.batches[number]))
        pair = replace(self, batches=[self.batches[richest]] * 2, spill=None, twins=False)
        start = visit_to_resume_at(journal, self.run.processes, blocks, richest, pair.arrivals)
        with closing(self.arrivals(after_last)) as arrivals:
            for visit, arrival in enumerate(arrivals):
                block = blocks[arrival.index]
                if visit < start:
                    assert journal is not None
                    for number in arrival.waiting:
                        arrival.finish(number, journal.hidden.output(number, blank=visit < start - 1))
                    continue
                last = visit + 1 == len(self.order) and after_last is None  # the last block's output is not used
                keep = journal.hidden.keeper(visit) if journal and not last else None
                if self.twins and self.run.has_finished(block) and not last:
                    raise RuntimeError(_NO_WAY_BACK.format(block.name))
                with onload(block.module) as onloaded:
                    masks: Mapping[str, Tensor] = {}
                    if block.weights and arrival.index not in repeated and not self.run.has_finished(block):
                        streamed = self.streamed(arrival, block, onloaded, rewrites=rewrites, keep=keep)
                        yield streamed
                        streamed.layers.clear()
                        masks = streamed.masks
                    if not last:
                        with masked(block, masks), lent_precision(block.module):
                            _advance(arrival, keep)
                if journal:
                    journal.commit(None if last else visit)
                if last:
                    return
                release_memory()

    def streamed(
        self,
        arrival: Arrival,
        block: Block,
        onloaded: Onloaded,
        *,
        rewrites: bool,
        keep: Callable[[int, Any], None] | None,
    ) -> StreamedBlock:
        """Collects a block's statistics and returns what the caller of `stream_blocks` gets."""
        stats, unseen = self.collect(arrival, block, keep_outputs=not rewrites)
        streamed = _streamed(arrival.index, block, onloaded, stats, len(self.model_layers.blocks), unseen)
        streamed._spill = self.spill
        if self.twins:
            of_text = is_of_text(self.model, block)
            present = [number for number in arrival.waiting if number < len(self.batches)]
            streamed.twins = TwinWalk(present, self.batches, arrival, self.spill, keep, of_text)
        return streamed

    def collect(
        self, arrival: Arrival, block: Block, *, keep_outputs: bool
    ) -> tuple[dict[str, InputStats], dict[str, str]]:
        """Returns (the statistics of a block's inputs over all processes' batches, the reasons where they are missing)."""
        if not self.needs:
            return {}, {}
        with lent_precision(block.module):
            collector = Collector(Operands(block.weights.values()), self.needs)
            sequences = self.add(collector, arrival, keep_outputs=keep_outputs)
            return self.finish(collector, block, sequences)

    def finish(
        self, collector: Collector, block: Block, sequences: int
    ) -> tuple[dict[str, InputStats], dict[str, str]]:
        """Ends a collection over `sequences` sequences of this process; returns what `collect` does."""
        collector.finish(sequences)
        return self.run.merge(collector.stats, block, self.needs, sequences), collector.unseen

    def add(self, collector: Collector, arrival: Arrival, *, keep_outputs: bool) -> int:
        """Runs the block on all batches while the collector observes; returns the number of sequences."""
        total = 0
        of_text = is_of_text(self.model, self.model_layers.blocks[arrival.index])
        for number in arrival.waiting:
            if number >= len(self.batches):
                continue  # a dense walk
            batch = self.batches[number]
            sequences, length, masks = padding(batch, arrival.arguments(number), of_text=of_text)
            total += sequences
            around = _observing(collector, length=length, masks=masks, whole=keep_outputs)
            collector.begin_batch()
            output = arrival.run(number, stay=not keep_outputs, around=around, sequences=sequences)
            if keep_outputs:
                arrival.finish(number, output)
        return total

    def gather(self, repeated: set[int]) -> Iterator[StreamedBlock]:
        """Collects over all visits of the `repeated` blocks in a dense pass, then yields them."""
        collectors: dict[int, Collector] = {}
        sequences = dict.fromkeys(repeated, 0)
        with closing(self.arrivals()) as arrivals:
            for arrival in arrivals:
                block = self.model_layers.blocks[arrival.index]
                with onload(block.module), lent_precision(block.module):
                    if arrival.index in repeated and block.weights and self.needs:
                        operands = Operands(block.weights.values())
                        collector = collectors.setdefault(arrival.index, Collector(operands, self.needs))
                        collector.operands = operands
                        sequences[arrival.index] += self.add(collector, arrival, keep_outputs=True)
                    _advance(arrival)
        for index in sorted(repeated):
            block = self.model_layers.blocks[index]
            if not block.weights:
                continue
            with onload(block.module) as onloaded:
                stats: dict[str, InputStats] = {}
                unseen: dict[str, str] = {}
                if index in collectors:
                    stats, unseen = self.finish(collectors[index], block, sequences[index])
                yield _streamed(index, block, onloaded, stats, len(self.model_layers.blocks), unseen)
            if self.run.journal:
                self.run.journal.commit(None)


def _observing(collector: Collector, *, length: int, masks: Sequence[Tensor], whole: bool) -> Around:
    """Returns what a part of a batch is run under while a collector observes."""

    @contextmanager
    def around(part: slice) -> Iterator[None]:
        observing = collector.observe(part, length=length, masks=[mask[part] for mask in masks], whole=whole)
        with suppress(Enough), observing:
            yield

    return around


def _advance(arrival: Arrival, keep: Callable[[int, Any], None] | None = None) -> None:
    """Runs the block, while it is on its device, for all batches that still wait; `keep` stores the outputs."""
    for number in arrival.waiting:
        output = arrival.run(number, stay=False)
        if keep:
            keep(number, output)
        arrival.finish(number, output)
