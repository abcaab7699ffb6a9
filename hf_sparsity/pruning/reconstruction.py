"""Block reconstruction: train what pruning left of a half-block until the half does again what the dense one did.

No labels, no loss of the whole model: one half (attention, MLP) at a time, on the calibration batches. Two walks of
each batch make it possible. One goes through the blocks as they are now, pruned and trained, and brings the inputs
that the half will really get; the other goes through the dense blocks, and brings what should come out. As a half adds
its output to the residual stream, it is the stream behind it that is made equal to the dense one: so a half also makes
up for what the blocks before it lost. EBFT (Guo et al., https://arxiv.org/abs/2402.12419) trains whole blocks in this
way; that halves do better than single matrices is the finding of https://arxiv.org/abs/2510.14444.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.journal import Journal
from ..distributed import Processes
from ..model.layers import Block, ModelLayers
from ..streaming.run import Progress
from ..streaming.stream import StreamedBlock
from ..streaming.twin_walk import TwinWalk
from .half_blocks import DENSE, HALF, DenseOutputs, Example, HalfBlock, energy, example, observe

logger = logging.getLogger(__name__)

# Of each batch's hidden states, while a half is trained: both walks' own, what the dense block got and what its two
# halves gave, what the pruned half gets and what it should give.
STREAMS = 7


@dataclass(frozen=True)
class BlockReconstruction:
    """How the surviving weights of each half-block are trained, by Adam, in float32.

    Args:
        epochs: passes over the training sequences, at most; one step a calibration batch.
        lr: of the first step, in units of the root mean square of a layer's surviving weights, so that one value suits
            models of any scale; it falls linearly to zero. The default is for about a thousand steps (on calibration text
            0.0125 to 0.1 are within 1.5 % of each other in perplexity); few steps want more.
        patience: epochs without a new best on the held-out sequences after which a half is done.
        heldout: share of the calibration batches, the last ones, that judge and are not trained on; at least one.

    Raises:
        ValueError: a number outside its range.
    """

    epochs: int = 10
    lr: float = 0.025
    patience: int = 2
    heldout: float = 0.125

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"BlockReconstruction: {name}={value!r}; a whole number of at least 1 is expected")
        for name, high in (("lr", 1.0), ("heldout", 0.5)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= high:
                raise ValueError(
                    f"BlockReconstruction: {name}={value!r}; a number above 0 and up to {high} is expected"
                )

    def to_dict(self) -> dict[str, Any]:
        """The options, as JSON types."""
        return dataclasses.asdict(self)

    def split(self, count: int) -> tuple[range, range]:
        """(numbers of the batches to train on, of those held out); `ValueError` when there are fewer than two."""
        if count < 2:
            raise ValueError(f"reconstruction needs at least 2 calibration batches, one of them held out; got {count}")
        held = min(count - 1, max(1, int(count * self.heldout)))
        return range(count - held), range(count - held, count)


@dataclass
class Reconstruction:
    """Carries it out while the blocks of a pruning pass stream by; `results`: one record for each trained half."""

    options: BlockReconstruction
    seed: int
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, options: BlockReconstruction | None, seed: int) -> Reconstruction | None:
        """None for None; `ValueError` for what is no `BlockReconstruction`, and in several processes."""
        if options is None:
            return None
        if not isinstance(options, BlockReconstruction):
            raise ValueError(f"reconstruct={options!r}: a BlockReconstruction(...) is expected")
        if Processes.current().count > 1:
            raise ValueError("reconstruction runs in one process; start it without accelerate launch or torchrun")
        if torch.is_inference_mode_enabled():
            raise ValueError("reconstruction trains, which torch.inference_mode() forbids; leave it, or use no_grad()")
        return cls(options, seed)

    def check(self, count: int) -> None:
        """`ValueError` when this many batches are too few."""
        self.options.split(count)

    def watch(self, block: StreamedBlock, layout_block: Block) -> DenseOutputs | None:
        """Sees what the dense block does and lets the dense walks go on; call it before the block is pruned.

        None for a block that no batch visits.
        """
        return observe(block.twins, layout_block) if block.twins else None

    def train(
        self, block: StreamedBlock, dense: DenseOutputs, progress: Progress, journal: Journal | None = None
    ) -> None:
        """Trains the pruned block, half by half, and writes what became better; the journal remembers the errors."""
        for layer in block.layers.values():
            layer.stats = None  # Gram matrices are as large as what comes now
        records = []
        for index, half in enumerate(dense.halves):
            if half.zeros == 0:
                continue  # nothing was pruned: dense it stays
            progress.say(f"reconstructing {half.name}")
            record, new = self._half(block, dense, index)
            records.append(record)
            for weights in half.weights.values() if new else ():
                for weight in weights:
                    block.write(weight.name, new[weight.name])
            logger.info(
                "%s.%s: held-out error %.4g -> %.4g in %d epochs%s",
                *(block.name, half.name, record["before"], record["after"], record["epochs"]),
                "" if new else " (weights kept)",
            )
        assert block.twins is not None
        block.twins.drop(DENSE)
        self.results[block.name] = records
        if journal:
            journal.remember("reconstructed", block.name, records)

    def _half(self, block: StreamedBlock, dense: DenseOutputs, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert block.twins is not None
        half = dense.halves[index]
        examples = [example(block.twins, dense, index, number) for number in range(block.twins.count)]
        train, held = self.options.split(len(examples))
        scale = sum(_energy(block.twins, dense, index, i, examples[i].real) for i in held) or 1.0
        fit = _Fit(half, [examples[i] for i in train], [examples[i] for i in held])
        before, after, epochs = fit.run(self.options, Random(f"{self.seed} {block.name} {half.name}"))
        block.twins.drop(HALF)
        record = {"half": half.name, "before": before / scale, "after": after / scale, "epochs": epochs}
        return record, fit.found()

    def summary(self, model_layers: ModelLayers, journal: Journal | None = None) -> dict[str, Any]:
        """For the model's config: options, how many halves became better, mean relative held-out error."""
        known = {b.name: journal.recall("reconstructed", b.name) or [] for b in model_layers.blocks} if journal else {}
        records = [
            r for block in model_layers.blocks for r in self.results.get(block.name) or known.get(block.name, [])
        ]
        improved = sum(record["after"] < record["before"] for record in records)
        means = {
            f"error_{when}": sum(record[when] for record in records) / len(records) if records else None
            for when in ("before", "after")
        }
        return {"options": self.options.to_dict(), "improved": improved, "kept": len(records) - improved, **means}


class _Fit:
    """Trains the survivors of one half; everything it holds is of that half."""

    def __init__(self, half: HalfBlock, train: Sequence[Example], held: Sequence[Example]):
        self.half, self.train, self.held = half, train, held
        self.stored = {name: weights[0].stored.detach() for name, weights in half.weights.items()}
        self.kept = {name: _survivors(half, name, value) for name, value in self.stored.items()}
        self.best: dict[str, Tensor] = {}  # in the model's dtype, if better than what is stored

    def run(self, options: BlockReconstruction, random: Random) -> tuple[float, float, int]:
        """(held-out error before, after, epochs that were run)."""
        before = best = self.judge(self.stored)
        masters = {n: v.to(torch.float32, copy=True).requires_grad_() for n, v in self.stored.items()}
        scales = {n: _rms(v, self.kept[n]) for n, v in self.stored.items()}
        adam = torch.optim.Adam([{"params": [v], "lr": options.lr * scales[n]} for n, v in masters.items()])
        steps = options.epochs * len(self.train)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        since = epochs = 0
        while epochs < options.epochs and since < options.patience and math.isfinite(best):
            epochs += 1
            for one in random.sample(self.train, len(self.train)):
                self.step(masters, one)
                adam.step()
                schedule.step()
            rounded = self.rounded(masters)
            error = self.judge(rounded)
            since += 1
            if error < best:
                best, since = error, 0
                self.best = {name: value.clone() for name, value in rounded.items()}
        return before, best, epochs

    def step(self, masters: Mapping[str, Tensor], example: Example) -> None:
        """Gradients of one batch, zero outside the mask: so are Adam's moments there, and a zero never moves."""
        with torch.enable_grad(), example.lent():
            lent = {name: value.to(self.stored[name].dtype) for name, value in masters.items()}
            # Adam does not see the scale; half-precision gradients do.
            scale = max(float(energy(example.target.to(torch.float32), example.real)) / example.target.numel(), 1e-12)
            loss = example.error(self.half, lent) / scale
            gradients = torch.autograd.grad(loss, list(masters.values()), allow_unused=True)
        for (name, value), gradient in zip(masters.items(), gradients, strict=True):
            value.grad = torch.zeros_like(value) if gradient is None else gradient.masked_fill_(~self.kept[name], 0)

    @torch.no_grad()
    def judge(self, parameters: Mapping[str, Tensor]) -> float:
        """The error on the held-out sequences."""
        total = 0.0
        for one in self.held:
            with one.lent():
                total += float(one.error(self.half, parameters))
        return total

    def rounded(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they would be stored."""
        return {name: value.detach().to(self.stored[name].dtype) for name, value in masters.items()}

    def found(self) -> dict[str, Tensor]:
        """The new weights `[out, in]` by layer; empty if the old ones are the best."""
        result = {}
        for name, value in self.best.items():
            for weight in self.half.weights[name]:
                one = value if weight.expert is None else value[weight.expert]
                result[weight.name] = one.T if weight.transposed else one
        return result


def _energy(twins: TwinWalk, dense: DenseOutputs, index: int, number: int, real: Tensor | None) -> float:
    with twins.lent(DENSE, number):
        return dense.energy(index, number, real)


def _survivors(half: HalfBlock, name: str, value: Tensor) -> Tensor:
    """Where a parameter may change: the weights of its layers that are not zero. Other experts in it stay."""
    kept = torch.zeros_like(value, dtype=torch.bool)
    for weight in half.weights[name]:
        where = ... if weight.expert is None else weight.expert
        kept[where] = value[where] != 0
    return kept


def _rms(value: Tensor, kept: Tensor) -> float:
    return float(value.to(torch.float32)[kept].square().mean().sqrt()) if kept.any() else 0.0
