"""Walk the model block by block with real inputs; yield what the algorithms see.

`stream_blocks` is the one loop over a model. While it is suspended at a block, that block's weights
are on its device and `layers` hold the statistics of the inputs it really gets. When it resumes,
the (perhaps rewritten) block computes the inputs of the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Layer
from ..checkpoint.journal import Journal
from ..core.stats import InputStats
from ..model.inference import Batch, prepared
from ..model.layers import Block, ModelLayers, Weight
from ..model.offload import Onloaded, onload
from .forward import drive, known_order, padding, release_memory
from .lockstep import Arrival, lockstep
from .observer import Collector, Enough, MaskedProducts, Operands
from .run import PassOptions
from .spill import Spill

logger = logging.getLogger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class TwinWalk:
    """All batches at one block, each of them twice: behind the pruned blocks and, beside it, behind the dense ones.

    Numbers run from 0 to `count - 1` in both.
    """

    count: int
    _batches: Sequence[Batch]
    _arrival: Arrival
    _spill: Spill | None
    _keep: Callable[[int, Any], None] | None

    def call(self, number: int) -> Call:
        """The arguments that a batch brings from the pruned blocks."""
        if self._spill:
            self._spill.fetch(number)
        args, kwargs = self.lasting(self._arrival.calls[number])
        if self._spill:
            self._spill.rest(number)
        return args, kwargs

    def lasting(self, value: Any) -> Any:
        """Nested arguments, seen while a block runs, for later: copied if what they hold may leave memory."""
        if isinstance(value, Tensor):
            return value.detach().clone() if self._spill else value.detach()
        if type(value) in (tuple, list):
            return type(value)(map(self.lasting, value))
        return {key: self.lasting(one) for key, one in value.items()} if type(value) is dict else value

    def pruned(self, number: int) -> Any:
        """The block's output on what the pruned blocks gave; the batch waits on, whatever happens."""
        try:
            return self._arrival.run(number, stay=False)
        finally:
            if self._spill:
                self._spill.rest(number)

    def dense(self, number: int) -> tuple[Call, Any]:
        """(arguments, the block's output) behind the dense blocks. Once, while the block is dense: the batch walks on."""
        number += self.count
        args, kwargs = self._arrival.calls[number]
        output = self._arrival.run(number, stay=False)
        call, last = self.lasting((args, kwargs)), self.lasting(output)
        if self._keep:
            self._keep(number, output)
        self._arrival.finish(number, output)
        return call, last

    def hold(self, what: str, number: int, value: Any) -> None:
        """Tensors recorded of a batch wait with the batches: beyond the limit they leave memory, except while `lent`.

        They must be of their own, see `lasting`; and `drop`ped when they are done with.
        """
        if self._spill:
            self._spill.arrive((what, number), value)

    @contextmanager
    def lent(self, what: str, number: int) -> Iterator[None]:
        """What is held under this name is in memory meanwhile."""
        if self._spill:
            self._spill.fetch((what, number))
        yield
        if self._spill:
            self._spill.rest((what, number))

    def drop(self, what: str) -> None:
        """What is held under this name of all batches is not needed any more."""
        for number in range(self.count) if self._spill else ():
            assert self._spill is not None
            self._spill.drop((what, number))

    def real(self, number: int, shape: torch.Size) -> Tensor | None:
        """Where an output of this shape belongs to tokens that are not padding, `[sequences, tokens]`; None: everywhere."""
        masks = padding(self._batches[number], self._arrival.calls[number][1])[2]
        return next((mask for mask in masks if mask.shape == shape[:2]), None)


@dataclass
class StreamedBlock:
    """One block while the stream is suspended at it.

    `layers`: its layers by name, weights on their device and not to be modified. `write` replaces one
    weight; `mask` makes the block compute as if a layer were pruned, this once, writing nothing.
    """

    index: int
    name: str
    layers: dict[str, Layer]
    total: int
    _weights: dict[str, Weight] = field(repr=False)
    _onloaded: Onloaded = field(repr=False)
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    twins: TwinWalk | None = field(
        default=None, repr=False
    )  # if asked for; the dense ones must walk on before any `write`
    tell: Callable[[str], None] = field(default=lambda _: None, repr=False)  # says how far work on the block is

    def write(self, name: str, value: Tensor) -> None:
        """Replaces a layer's weight, `value` `[out, in]`."""
        self._onloaded.write(self._weights[name], value)

    def mask(self, name: str, mask: Tensor) -> None:
        """Masks a layer (True = kept, `[out, in]`) while the inputs of the next block are computed."""
        self.masks[name] = mask

    def mask_of(self, weight: Weight) -> Tensor | None:
        """The mask set for a weight, if any."""
        return self.masks.get(weight.name)


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
        needs: the facts of `core/stats.py` to collect; empty for none. They are of all processes' batches.
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
    visited: list[int] | None = None
    if batches:
        with prepared(model), run.spilling(model, batches) as spill:
            visited = run.journal.order if run.journal else None
            visited = visited or known_order(model, model_layers, batches[0])
            if run.journal:
                run.journal.begin_pass(visited, len(batches) * (1 + twins))
            repeated = {index for index in visited if visited.count(index) > 1}
            if repeated and twins:
                name = model_layers.blocks[min(repeated)].name
                raise ValueError(f"{name} runs several times in one pass; such a model cannot be reconstructed")
            one = _Pass(model, model_layers, batches, needs, run, spill, twins)
            if repeated:
                yield from one.gather(repeated)
            yield from one.walk(visited, repeated, rewrites=rewrites, after_last=after_last)
    for index, block in enumerate(model_layers.blocks):
        wanted = index not in (visited or []) and (only is None or index in only)
        if wanted and block.weights and not run.has_finished(block):
            with onload(block.module) as onloaded:
                yield _streamed(index, block, onloaded, {}, len(model_layers.blocks))
            if run.journal:
                run.journal.commit(None)


def _streamed(index: int, block: Block, onloaded: Onloaded, stats: Mapping[str, Any], total: int) -> StreamedBlock:
    layers = {name: Layer(name, weight.read(), stats.get(name)) for name, weight in block.weights.items()}
    return StreamedBlock(index, block.name, layers, total, block.weights, onloaded)


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
    twins: bool = False

    @property
    def walks(self) -> Sequence[Batch]:
        """The batches that walk through the model; the dense ones come last."""
        return [*self.batches, *self.batches] if self.twins else self.batches

    def arrivals(self, after_last: Callable[[Batch, Any], None] | None = None) -> Generator[Arrival]:
        return lockstep(
            drive(self.model, after_last), [b.module for b in self.model_layers.blocks], self.walks, self.spill
        )

    def walk(
        self,
        order: list[int],
        repeated: set[int],
        *,
        rewrites: bool,
        after_last: Callable[[Batch, Any], None] | None,
    ) -> Iterator[StreamedBlock]:
        """Yields each block that is not `repeated` at its visit."""
        journal = self.run.journal
        start = self.resume_at()
        with closing(self.arrivals(after_last)) as arrivals:
            for visit, arrival in enumerate(arrivals):
                block = self.model_layers.blocks[arrival.index]
                if visit < start:
                    assert journal is not None
                    for number in range(len(self.walks)):
                        arrival.finish(number, journal.output(number, blank=visit < start - 1))
                    continue
                wanted = block.weights and arrival.index not in repeated and not self.run.has_finished(block)
                last = visit + 1 == len(order) and after_last is None  # nobody wants the output of the last block
                keep = journal.keeper(visit) if journal and not last else None
                if self.twins and self.run.has_finished(block) and not last:
                    raise RuntimeError(_NO_WAY_BACK.format(block.name))
                with onload(block.module) as onloaded:
                    if wanted:
                        operands = Operands(block.weights.values())
                        stats = self.collect(arrival, block, operands, keep_outputs=not rewrites)
                        streamed = _streamed(arrival.index, block, onloaded, stats, len(self.model_layers.blocks))
                        del stats
                        if self.twins:
                            streamed.twins = TwinWalk(len(self.batches), self.batches, arrival, self.spill, keep)
                        yield streamed
                        streamed.layers.clear()
                        if streamed.masks:
                            with MaskedProducts(operands, streamed.mask_of):
                                _advance(arrival)
                    if not last:
                        _advance(arrival, keep)
                if journal:
                    journal.commit(None if last else visit)
                if last:
                    return
                release_memory()

    def collect(
        self, arrival: Arrival, block: Block, operands: Operands, *, keep_outputs: bool
    ) -> dict[str, InputStats]:
        """The statistics of a block's inputs over all processes' batches."""
        if not self.needs:
            return {}
        collector = Collector(operands, self.needs)
        sequences = self.add(collector, arrival, keep_outputs=keep_outputs)
        collector.finish(sequences)
        return self.run.merge(collector.stats, block, self.needs, sequences)

    def add(self, collector: Collector, arrival: Arrival, *, keep_outputs: bool) -> int:
        """Runs the block on all batches under the collector's tap; returns the number of sequences."""
        total = 0
        for number, batch in enumerate(self.batches):
            sequences, length, masks = padding(batch, arrival.calls[number][1])
            total += sequences
            with suppress(Enough), collector.tap(sequences=sequences, length=length, masks=masks, whole=keep_outputs):
                output = arrival.run(number, stay=not keep_outputs)
            if keep_outputs:
                arrival.finish(number, output)
        return total

    def gather(self, repeated: set[int]) -> Iterator[StreamedBlock]:
        """A dense pass that gathers over all visits of the `repeated` blocks, then yields them."""
        collectors: dict[int, Collector] = {}
        sequences = dict.fromkeys(repeated, 0)
        with closing(self.arrivals()) as arrivals:
            for arrival in arrivals:
                block = self.model_layers.blocks[arrival.index]
                with onload(block.module):
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
                if index in collectors:
                    collectors[index].finish(sequences[index])
                    stats = self.run.merge(collectors[index].stats, block, self.needs, sequences[index])
                yield _streamed(index, block, onloaded, stats, len(self.model_layers.blocks))
            if self.run.journal:
                self.run.journal.commit(None)

    def resume_at(self) -> int:
        """The visit from which to go on: the last one whose inputs are on disk, where the architecture allows it.

        It does when what a later block gets depends on nothing but the output of the block before and the
        batch. That is tried on the first batch: beside its true walk, one that begins with the stored output
        must come to every later block with the same arguments.
        """
        journal = self.run.journal
        if journal is None:
            return 0
        start = min(self.run.processes.gather(journal.start))
        if start and not self.arrives_alike(start, journal):
            start = 0
        return min(self.run.processes.gather(start))

    def arrives_alike(self, start: int, journal: Journal) -> bool:
        """Whether a walk of the first batch that begins with the stored output equals its true walk from there on."""
        pair = replace(self, batches=[self.batches[0]] * 2, spill=None, twins=False)
        try:
            with closing(pair.arrivals()) as arrivals:
                for visit, arrival in enumerate(arrivals):
                    if visit >= start and not _same(*arrival.calls):
                        return False
                    with onload(self.model_layers.blocks[arrival.index].module):
                        output = arrival.run(0)
                    arrival.finish(0, output)
                    arrival.finish(1, journal.output(0, blank=visit < start - 1) if visit < start else output)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            logger.info("no way to go on from stored inputs (%s); the finished blocks are computed again", error)
            return False
        return True


def _same(one: Any, other: Any) -> bool:
    """Whether nested arguments hold equal tensors; what is neither tensor nor container counts as equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _advance(arrival: Arrival, keep: Callable[[int, Any], None] | None = None) -> None:
    """Runs the block, while it is on its device, for all batches that still wait; `keep` stores the outputs."""
    for number, (args, kwargs) in enumerate(arrival.calls):
        if args or kwargs:
            output = arrival.run(number, stay=False)
            if keep:
                keep(number, output)
            arrival.finish(number, output)
