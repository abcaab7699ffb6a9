"""Walk the model block by block with real inputs; yield what the algorithms see.

`stream_blocks` is the one loop over a model. While it is suspended at a block, that block's weights
are on its device and `layers` hold the statistics of the inputs it really gets. When it resumes,
the (perhaps rewritten) block computes the inputs of the next one.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..algorithm import Layer
from .layers import Block, Layout, Weight
from .lockstep import Arrival, lockstep
from .offload import Onloaded, onload
from .tap import Collector, Enough, MaskedProducts, Operands

# A batch as the model's forward takes it. Text batches have at least `input_ids` [sequences, tokens].
Batch = Mapping[str, Any]


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

    def write(self, name: str, value: Tensor) -> None:
        """Replaces a layer's weight, `value` `[out, in]`."""
        self._onloaded.write(self._weights[name], value)

    def mask(self, name: str, mask: Tensor) -> None:
        """Masks a layer (True = kept, `[out, in]`) while the inputs of the next block are computed."""
        self.masks[name] = mask


def stream_blocks(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    needs: frozenset[str],
    *,
    rewrites: bool,
    after_last: Callable[[Batch, Any], None] | None = None,
) -> Iterator[StreamedBlock]:
    """Yields every block with prunable weights once, in the order of execution, then those that never ran.

    Args:
        layout: from `find_layout`.
        batches: from `prepare_batches`. Empty: no forward pass at all, blocks in definition order, no statistics.
        needs: the facts of `core/stats.py` to collect; empty for none.
        rewrites: whether the caller may `write` or `mask`. If not, each block runs once instead of twice.
        after_last: called with each batch and the model's output for it; without it no head is computed.

    A block that the model runs several times in one pass gathers its statistics over all of them, in a
    dense pass of its own before the others, and is yielded once.
    """
    if not batches:
        yield from _without_inputs(layout)
        return
    with _prepared(model):
        order = _visits(model, layout, batches[0])
        repeated = {index for index in order if order.count(index) > 1}
        if repeated:
            yield from _gather_repeated(model, layout, batches, needs, repeated)
        yield from _pass(model, layout, batches, needs, order, repeated, rewrites=rewrites, after_last=after_last)
    for index, block in enumerate(layout.blocks):
        if index not in order and block.weights:
            with onload(block.module) as onloaded:
                yield _streamed(index, block, onloaded, {}, len(layout.blocks))


def _without_inputs(layout: Layout) -> Iterator[StreamedBlock]:
    for index, block in enumerate(layout.blocks):
        if block.weights:
            with onload(block.module) as onloaded:
                yield _streamed(index, block, onloaded, {}, len(layout.blocks))


def _streamed(index: int, block: Block, onloaded: Onloaded, stats: Mapping[str, Any], total: int) -> StreamedBlock:
    layers = {name: Layer(name, weight.read(), stats.get(name)) for name, weight in block.weights.items()}
    return StreamedBlock(index, block.name, layers, total, block.weights, onloaded)


def _pass(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    needs: frozenset[str],
    order: list[int],
    repeated: set[int],
    *,
    rewrites: bool,
    after_last: Callable[[Batch, Any], None] | None,
) -> Iterator[StreamedBlock]:
    """One lockstep pass that yields each block that is not `repeated` at its visit."""
    visits = 0
    for arrival in lockstep(_drive(model, after_last), [b.module for b in layout.blocks], batches):
        block = layout.blocks[arrival.index]
        with onload(block.module) as onloaded:
            visits += 1
            if arrival.index not in repeated and block.weights:
                operands = Operands(block.weights.values())
                collector = Collector(operands, needs)
                if needs:
                    sequences = _collect(collector, model, arrival, batches, keep_outputs=not rewrites)
                    collector.finish(sequences)
                streamed = _streamed(arrival.index, block, onloaded, collector.stats, len(layout.blocks))
                del collector
                yield streamed
                streamed.layers.clear()
                if masks := streamed.masks:
                    with MaskedProducts(operands, lambda weight: masks.get(weight.name)):
                        _advance(arrival)
            if visits == len(order) and after_last is None:
                return  # nobody wants the output of the last block
            _advance(arrival)
        _release_memory()


def _gather_repeated(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch], needs: frozenset[str], repeated: set[int]
) -> Iterator[StreamedBlock]:
    """A dense pass that gathers over all visits of the `repeated` blocks, then yields them."""
    collectors: dict[int, Collector] = {}
    sequences = dict.fromkeys(repeated, 0)
    for arrival in lockstep(_drive(model, None), [b.module for b in layout.blocks], batches):
        block = layout.blocks[arrival.index]
        with onload(block.module):
            if arrival.index in repeated and block.weights and needs:
                operands = Operands(block.weights.values())
                collector = collectors.setdefault(arrival.index, Collector(operands, needs))
                collector.operands = operands
                sequences[arrival.index] += _collect(collector, model, arrival, batches, keep_outputs=True)
            _advance(arrival)
    for index in sorted(repeated):
        block = layout.blocks[index]
        if not block.weights:
            continue
        if index in collectors:
            collectors[index].finish(sequences[index])
        with onload(block.module) as onloaded:
            yield _streamed(
                index, block, onloaded, collectors[index].stats if index in collectors else {}, len(layout.blocks)
            )


def _collect(
    collector: Collector, model: PreTrainedModel, arrival: Arrival, batches: Sequence[Batch], *, keep_outputs: bool
) -> int:
    """Runs the block on all batches under the collector's tap; returns the number of sequences."""
    total = 0
    for number, batch in enumerate(batches):
        sequences, length, masks = _padding(batch, arrival.calls[number][1])
        total += sequences
        with suppress(Enough), collector.tap(sequences=sequences, length=length, masks=masks, whole=keep_outputs):
            output = arrival.run(number)
            if keep_outputs:
                arrival.finish(number, output)
    return total


def _advance(arrival: Arrival) -> None:
    """Computes the missing outputs while the block is on its device; each input is freed once used."""
    for number in range(len(arrival.calls)):
        if number not in arrival.outputs:
            arrival.finish(number, arrival.run(number))


def _padding(batch: Batch, kwargs: Mapping[str, Any]) -> tuple[int, int, list[Tensor]]:
    """(sequences, tokens of each, masks of real tokens to try in order if any token is padding)."""
    ids = next((batch[k] for k in ("input_ids", "decoder_input_ids") if k in batch), None)
    first = ids if ids is not None else next(v for v in batch.values() if isinstance(v, Tensor))
    given = [batch.get("attention_mask")]
    if kwargs.get("encoder_hidden_states") is not None:  # a decoder block that also attends to an encoder
        target = batch.get("decoder_attention_mask")
        if target is None and "decoder_input_ids" in batch:
            target = torch.ones_like(batch["decoder_input_ids"])
        given.insert(0, target)
    masks = [mask.bool() for mask in given if isinstance(mask, Tensor) and mask.ndim == 2]
    if all(bool(mask.all()) for mask in masks):
        masks = []
    elif len(masks) == 2 and masks[0].shape == masks[1].shape and not torch.equal(*masks):
        raise ValueError(
            "padded encoder and decoder inputs of equal length cannot be told apart: give them different lengths"
        )
    return first.shape[0], 0 if ids is None else ids.shape[1], masks


def _drive(model: PreTrainedModel, after_last: Callable[[Batch, Any], None] | None) -> Callable[..., Any]:
    """The forward to run: without cache, and without the head unless its output is wanted."""
    whole = model
    base = getattr(model, "base_model", model) if after_last is None else model
    signatures = {id(m): inspect.signature(m.forward).parameters for m in (base, whole)}

    def takes(module: nn.Module, name: str) -> bool:
        parameters = signatures[id(module)]
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def forward(**batch: Any) -> Any:
        module = base if all(takes(base, name) for name in batch) else whole
        extra = {"use_cache": False} if takes(module, "use_cache") else {}
        output = module(**batch, **extra)
        if after_last is not None:
            after_last(batch, output)
        return output

    return forward


def _visits(model: PreTrainedModel, layout: Layout, batch: Batch) -> list[int]:
    """Indices of the blocks in the order in which the first sequence visits them.

    Raises:
        ValueError: the model's output is NaN or infinite, so no statistic would mean anything.
    """
    order: list[int] = []
    hooks = [
        block.module.register_forward_pre_hook(lambda *_, index=index: order.append(index))
        for index, block in enumerate(layout.blocks)
    ]
    try:
        with torch.no_grad():
            output = _drive(model, None)(**{name: value[:1] for name, value in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    first = output if isinstance(output, Tensor) else output[0]
    if isinstance(first, Tensor) and not torch.isfinite(first).all():
        raise ValueError(
            f"the model's output is NaN or infinite on the calibration data in {first.dtype}: "
            "load it in bfloat16 or float32, or check the checkpoint"
        )
    return order


@contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and experts computed one by one so that each one's inputs can be seen; restored after."""
    training = {module: module.training for module in model.modules()}
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    model.eval()
    try:
        if experts:
            model.set_experts_implementation("eager")
        yield
    finally:
        if experts:
            model.set_experts_implementation(experts)
        for module, mode in training.items():
            module.training = mode


def _release_memory() -> None:
    """Gives freed heap back to the system: glibc keeps it otherwise, and peak memory would grow with depth."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


_malloc_trim = _find_malloc_trim()
