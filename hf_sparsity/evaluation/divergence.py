"""How far a masked model departs from the dense one: exact KL, one forward pass for each plan.

Masks are looked up in ranks of one byte a weight and live one block at a time: while a block runs, masked copies stand
in for its weights. Of the dense model what its last block gave is kept for every batch; the model's own head makes
logits of it again. So a candidate costs one forward pass of the text it is judged on, a second run of the head, and
one multiplication a weight; no statistic is taken again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model.classes import text_config
from ..model.devices import Parked
from ..model.inference import Batch, prepared
from ..model.layers import Block, ModelLayers
from ..model.masked import masked
from ..model.offload import onload
from ..model.precision import lent_precision
from ..streaming.forward import drive
from ..streaming.lockstep import Arrival, lockstep
from .perplexity import LOGITS
from .token_scores import token_scores

logger = logging.getLogger(__name__)

TOGETHER = 2048  # tokens of one forward pass, enough to keep the matrix products busy
WORST = 1e4  # nats, the largest score of a token: finite, so that plans can still be told apart and written down
HIGHEST = 700.0  # nats, the largest mean loss whose perplexity is still a number

SequenceSums = list[list[float]]  # (summed KL, summed loss, tokens) of each sequence


@dataclass(frozen=True)
class PlanScores:
    """Scores of a plan: for each sequence its mean `kl` from the dense model and `loss`, in nats a token, and its `tokens`."""

    kl: Tensor
    loss: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, rows: SequenceSums) -> PlanScores:
        """Returns the scores of what `DenseReference.rows` gives."""
        table = torch.tensor(rows, dtype=torch.float64)
        return cls(table[:, 0] / table[:, 2], table[:, 1] / table[:, 2], table[:, 2])

    def mean(self, metric: str = "kl") -> float:
        """Returns the mean over all predictions, in nats; `metric` is "kl" or "loss"."""
        return float((getattr(self, metric) * self.tokens).sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Perplexity over all predictions; finite, however bad the plan is."""
        return math.exp(min(self.mean("loss"), HIGHEST))


class DenseReference:
    """What the dense model predicts on some batches, against which any change of its blocks is judged.

    `replays`: True if its logits follow from the stored output of its last block; else the dense model runs along.
    """

    def __init__(self, model: PreTrainedModel, model_layers: ModelLayers, batches: Sequence[Batch]):
        """Runs the dense model once and keeps the hidden states of all tokens, `[tokens, width]`, in the host's memory.

        Raises `ValueError` for a model without logits.
        """
        self.model, self.model_layers, self.batches = model, model_layers, joined(model, batches)
        self._last: list[dict[str, Any]] = [{} for _ in self.batches]  # batch -> stack of blocks -> its last output
        self.replays = True
        logits: list[Tensor] = []

        def check(batch: Batch, output: Any) -> None:
            if getattr(output, "logits", None) is None:
                raise ValueError(f"{type(model).__name__} gives no logits; plans are judged on language models")
            logits[:] = [output.logits]

        with prepared(model), self._arrivals(check, self.batches) as arrivals:
            for arrival in arrivals:
                with onload(model_layers.blocks[arrival.index].module):
                    for number in arrival.waiting:
                        output = arrival.run(number, stay=False)
                        self._last[number][self._stack(arrival)] = Parked(output)
                        arrival.finish(number, output)
        try:  # twice, in case the model changes in place what a block gave it
            self.replays = all(torch.equal(self.dense_logits(-1), logits[-1]) for _ in range(2))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):  # raised by the model
            self.replays = False
        if not self.replays:
            logger.info("the dense model runs along: its head looks at more than the output of its last block")

    @contextmanager
    def _arrivals(self, after: Callable[[Batch, Any], None], walks: Sequence[Batch]) -> Iterator[Iterator[Arrival]]:
        modules = [block.module for block in self.model_layers.blocks]
        with closing(lockstep(drive(self.model, after), modules, walks)) as arrivals:
            yield arrivals

    def _stack(self, arrival: Arrival) -> str:
        """Returns the path of the list that a block stands in: a decoder's, an encoder's, a vision tower's."""
        return self.model_layers.blocks[arrival.index].name.rpartition(".")[0]

    def dense_logits(self, number: int) -> Tensor:
        """Returns the dense logits of a batch, from the stored output of its last block or from a run of the model."""
        logits: list[Tensor] = []
        with (
            prepared(self.model),
            self._arrivals(lambda _, output: logits.append(output.logits), [self.batches[number]]) as arrivals,
        ):
            for arrival in arrivals:
                if self.replays:
                    arrival.finish(0, self._last[number][self._stack(arrival)].back())
                    continue
                with onload(self.model_layers.blocks[arrival.index].module):
                    arrival.finish(0, arrival.run(0, stay=False))
        return logits[0]

    def rows(self, masks: Callable[[Block], Mapping[str, Tensor]] | None = None) -> SequenceSums:
        """Returns the sums of each sequence, in order, for the model as it is now or with masks on its layers.

        `masks`: returns the masks of a block's layers, `[out, in]`, True = kept.
        """
        rows: SequenceSums = []
        seen: list[Tensor] = []

        def compare(batch: Batch, output: Any) -> None:
            seen.append(output.logits)
            if len(seen) == 2:
                rows.extend(compared(batch, *seen))
                seen.clear()

        walks = [batch for batch in self.batches for _ in range(2)]  # dense, masked, dense, masked, ...
        with prepared(self.model), self._arrivals(compare, walks) as arrivals:
            for arrival in arrivals:
                block = self.model_layers.blocks[arrival.index]
                with onload(block.module):
                    waiting = [number // 2 for number in arrival.waiting if number % 2 == 0]
                    if self.replays:
                        dense = {n: self._last[n][self._stack(arrival)] for n in waiting}
                    else:
                        dense = {n: Parked(arrival.run(2 * n, stay=False)) for n in waiting}
                    with masked(block, masks(block) if masks else {}), lent_precision(block.module):
                        for number, output in dense.items():
                            arrival.finish(2 * number, output.back())
                            arrival.finish(2 * number + 1, arrival.run(2 * number + 1, stay=False))
        return rows


def joined(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Batch]:
    """Returns batches in which plain texts of equal length are joined, several sequences at a time."""
    vocabulary = getattr(text_config(model.config), "vocab_size", None) or 2**17
    most = min(TOGETHER, LOGITS // vocabulary)
    result: list[Batch] = []
    for batch in batches:
        alone = set(batch) != {"input_ids"}
        if result and not alone and set(result[-1]) == {"input_ids"}:
            before, ids = result[-1]["input_ids"], batch["input_ids"]
            if before.shape[1] == ids.shape[1] and before.numel() + ids.numel() <= most:
                result[-1] = {"input_ids": torch.cat([before, ids])}
                continue
        result.append(batch)
    return result


def compared(batch: Batch, dense: Tensor, logits: Tensor) -> SequenceSums:
    """Returns (summed KL(dense ‖ model), summed loss, predictions) of each sequence that has any; see `by_token`."""
    kl, loss, real = by_token(batch, dense, logits)
    return [
        row for row in torch.stack([(kl * real).sum(1), (loss * real).sum(1), real.sum(1)], dim=1).tolist() if row[2]
    ]


def by_token(batch: Batch, dense: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (KL(dense ‖ model), loss of the next token, 1 or for padding 0) of each prediction.

    In nats, float64 `[sequences, tokens - 1]`, from float32; gradients pass. A token that the model cannot predict,
    because its logits overflow or exclude it, counts `WORST`.

    Args:
        dense: logits of the dense model, `[sequences, tokens, vocabulary]`.
        logits: those of the model to judge, of the same shape.
    """
    scores = token_scores(batch, logits, dense, lowest=-WORST)
    assert scores.kl is not None
    kl, loss = (values.double().nan_to_num(WORST) for values in (scores.kl, scores.loss))
    return kl, loss, scores.real.double()
