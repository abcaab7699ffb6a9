"""What pruning will touch and how much memory it will take, before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..core.stats import GRAM, SAMPLES
from .layers import Block, Layout
from .stream import Batch


@dataclass(frozen=True)
class Estimate:
    """`model` bytes of weights already there; `hidden` of the calibration batches' hidden states; `block` of one
    block's statistics, scores and the largest matrix' working copies."""

    model: int
    hidden: int
    block: int

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.model + self.hidden + self.block


def estimate_memory(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch], needs: frozenset[str]
) -> Estimate:
    """Bytes that `prune` will hold at once, from shapes alone; activations inside one block call come on top."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    itemsize = next(model.parameters()).element_size()
    tokens = sum(batch.get("input_ids", next(iter(batch.values()))).numel() for batch in batches)
    hidden = tokens * (getattr(config, "hidden_size", 0) or 0) * itemsize if needs else 0
    return Estimate(weights, hidden, max(_block_bytes(block, needs, len(batches)) for block in layout.blocks))


def _block_bytes(block: Block, needs: frozenset[str], sequences: int) -> int:
    if not block.weights:
        return 0
    total = 0
    for weight in block.weights.values():
        width = weight.shape[1]
        total += 4 * width if needs else 0
        total += 4 * width * width if GRAM in needs else 0
        total += 4 * width * sequences if SAMPLES in needs else 0
    largest = max(weight.size for weight in block.weights.values())
    widest = max(weight.shape[1] for weight in block.weights.values())
    return total + 4 * largest * 3 + (4 * widest * widest * 2 if GRAM in needs else 0)


def describe(layout: Layout, model: PreTrainedModel) -> dict[str, Any]:
    """`{"layers", "weights", "share", "dense": {reason: number of matrices}}` of what will be pruned and what not."""
    weights = sum(weight.size for weight in layout.weights.values())
    return {
        "layers": len(layout.weights),
        "blocks": len(layout.blocks),
        "weights": weights,
        "share": weights / sum(p.numel() for p in model.parameters()),
        "dense": dict(Counter(layout.skipped.values())),
    }
