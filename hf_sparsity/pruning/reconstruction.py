"""Block reconstruction: train the surviving weights of a half-block until it computes again what the dense one did.

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
from ..validation import check_number
from .half_blocks import DENSE, HALF, DenseOutputs, Example, HalfBlock, energy, example, observe

logger = logging.getLogger(__name__)

# Copies of each batch's hidden states that are held while a half is trained: those of both walks, the dense block's
# input and the outputs of its two halves, the pruned half's input and its target.
STREAMS = 7


@dataclass(frozen=True)
class BlockReconstruction:
    """Options for training the surviving weights of each half-block, by Adam, in float32.

    Args:
        epochs: passes over the training sequences, at most; one step a calibration batch.
        lr: learning rate of the first step, in units of the root mean square of a layer's surviving weights, so that
            one value suits models of any scale; it falls linearly to zero. The default is for about a thousand steps (on
            calibration text 0.0125 to 0.1 are within 1.5 % of each other in perplexity); fewer steps need more.
        patience: epochs without a new best on the held-out sequences after which a half is done.
        heldout: share of the calibration batches, the last ones, that are judged on and not trained on; at least one.

    Raises:
        ValueError: a number outside its range.
    """

    epochs: int = 10
    lr: float = 0.025
    patience: int = 2
    heldout: float = 0.125

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            check_number(f"BlockReconstruction: {name}", getattr(self, name), "[1, inf)", whole=True)
        check_number("BlockReconstruction: lr", self.lr, "(0, 1]")
        check_number("BlockReconstruction: heldout", self.heldout, "(0, 0.5]")

    def to_dict(self) -> dict[str, Any]:
        """The options, as JSON types."""
        return dataclasses.asdict(self)

    def split(self, count: int) -> tuple[range, range]:
        """Returns (numbers of the batches to train on, of those held out); raises ValueError when there are fewer than two."""
        if count < 2:
            raise ValueError(f"reconstruction needs at least 2 calibration batches, one of them held out; got {count}")
        held = min(count - 1, max(1, int(count * self.heldout)))
        return range(count - held), range(count - held, count)


@dataclass
class Reconstruction:
    """Reconstructs the blocks of a pruning pass as they stream by; `results`: for each block one record a trained half."""

    options: BlockReconstruction
    seed: int
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, options: BlockReconstruction | None, seed: int) -> Reconstruction | None:
        """Returns the reconstruction with these options, None without any.

        Raises:
            ValueError: `options` is no `BlockReconstruction`; several processes; inference mode.
        """
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
        """Raises ValueError when `count` batches are too few."""
        self.options.split(count)

    def watch(self, block: StreamedBlock, layout_block: Block) -> DenseOutputs | None:
        """Records what the dense block computes and lets the dense walks go on; call it before the block is pruned.

        Returns None for a block that no batch visits.
        """
        return observe(block.twins, layout_block) if block.twins else None

    def train(
        self, block: StreamedBlock, dense: DenseOutputs, progress: Progress, journal: Journal | None = None
    ) -> None:
        """Trains the pruned block, half by half, and writes the halves that became better; the journal keeps the errors."""
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
        return record, fit.new_weights()

    def summary(self, model_layers: ModelLayers, journal: Journal | None = None) -> dict[str, Any]:
        """Returns what the model's config records: options, halves that became better, mean relative held-out error."""
        earlier = (
            {b.name: journal.recall("reconstructed", b.name) or [] for b in model_layers.blocks} if journal else {}
        )
        records = [
            record
            for block in model_layers.blocks
            for record in self.results.get(block.name) or earlier.get(block.name, [])
        ]
        improved = sum(record["after"] < record["before"] for record in records)
        means = {
            f"error_{when}": sum(record[when] for record in records) / len(records) if records else None
            for when in ("before", "after")
        }
        return {"options": self.options.to_dict(), "improved": improved, "kept": len(records) - improved, **means}


class _Fit:
    """Trains the surviving weights of one half, whose tensors are all that it holds."""

    def __init__(self, half: HalfBlock, train: Sequence[Example], held: Sequence[Example]):
        self.half, self.train, self.held = half, train, held
        self.stored = {name: weights[0].stored.detach() for name, weights in half.weights.items()}
        self.computes = {name: weights[0].used.dtype for name, weights in half.weights.items()}
        self.kept = {name: _survivors(half, name, value) for name, value in self.stored.items()}
        self.best: dict[str, Tensor] = {}  # parameters in the model's dtype; empty unless better than what is stored

    def run(self, options: BlockReconstruction, random: Random) -> tuple[float, float, int]:
        """Trains; returns (held-out error before, after, number of epochs that were run)."""
        before = best = self.judge(self.stored)
        masters = {n: v.to(torch.float32, copy=True).requires_grad_() for n, v in self.stored.items()}
        scales = {n: _rms(v, self.kept[n]) for n, v in self.stored.items()}
        adam = torch.optim.Adam([{"params": [v], "lr": options.lr * scales[n]} for n, v in masters.items()])
        steps = options.epochs * len(self.train)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        since = epochs = 0
        while epochs < options.epochs and since < options.patience and math.isfinite(best):
            epochs += 1
            for sample in random.sample(self.train, len(self.train)):
                self.step(masters, sample)
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
        """Sets the gradients of one batch, zero outside the mask: so are Adam's moments there, and a zero never moves."""
        with torch.enable_grad(), example.lent():
            lent = {name: value.to(self.computes[name]) for name, value in masters.items()}
            # The scale makes no difference to Adam, but keeps half-precision gradients in range.
            scale = max(float(energy(example.target.to(torch.float32), example.real)) / example.target.numel(), 1e-12)
            loss = example.error(self.half, lent) / scale
            gradients = torch.autograd.grad(loss, list(masters.values()), allow_unused=True)
        for (name, value), gradient in zip(masters.items(), gradients, strict=True):
            value.grad = torch.zeros_like(value) if gradient is None else gradient.masked_fill_(~self.kept[name], 0)

    @torch.no_grad()
    def judge(self, parameters: Mapping[str, Tensor]) -> float:
        """Returns the summed squared error on the held-out batches."""
        total = 0.0
        lent = {name: value.to(self.computes[name]) for name, value in parameters.items()}
        for sample in self.held:
            with sample.lent():
                total += float(sample.error(self.half, lent))
        return total

    def rounded(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the parameters as they would be stored, in the model's dtype."""
        return {name: value.detach().to(self.stored[name].dtype) for name, value in masters.items()}

    def new_weights(self) -> dict[str, Tensor]:
        """Returns the new weights `[out, in]` by layer; empty if the old ones are the best."""
        return {w.name: w.part(value) for name, value in self.best.items() for w in self.half.weights[name]}


def _energy(twins: TwinWalk, dense: DenseOutputs, index: int, number: int, real: Tensor | None) -> float:
    """Returns `DenseOutputs.energy` of a batch, whose tensors may wait on disk until then."""
    with twins.lent(DENSE, number):
        return dense.energy(index, number, real)


def _survivors(half: HalfBlock, name: str, value: Tensor) -> Tensor:
    """Returns where a parameter may change: at the non-zero weights of the half's layers. Other experts in it stay."""
    kept = torch.zeros_like(value, dtype=torch.bool)
    for weight in half.weights[name]:
        where = ... if weight.expert is None else weight.expert
        kept[where] = value[where] != 0
    return kept


def _rms(value: Tensor, kept: Tensor) -> float:
    """Returns the root mean square of the kept weights; 0 if there are none."""
    return float(value.to(torch.float32)[kept].square().mean().sqrt()) if kept.any() else 0.0
