"""Layers whose inputs were not seen, or are not finite."""

from __future__ import annotations

import torch

from ..core.stats import InputStats
from ..model.layers import ModelLayers
from .first_pass import NOT_USED
from .stream import StreamedBlock

FEWEST_TOKENS = 16  # tokens; an expert that saw fewer is pruned by magnitude, because its norms would be noise


def fall_back(block: StreamedBlock, model_layers: ModelLayers, needs: frozenset[str]) -> dict[str, str]:
    """Gives layers without enough inputs flat statistics, so that a score is the weight's magnitude.

    Returns these layers with the reasons, for the user to be told.
    """
    if not needs:
        return {}
    weights = model_layers.blocks[block.index].weights
    means = [layer.stats.norms.mean() for layer in block.layers.values() if layer.stats is not None]
    level = float(torch.stack([mean.cpu() for mean in means]).mean()) if means else 1.0
    notes = {}
    for name, layer in block.layers.items():
        tokens = layer.stats.tokens if layer.stats is not None else 0
        if tokens == 0:
            notes[name] = block.unseen.get(name, NOT_USED)
        elif weights[name].expert is not None and tokens < FEWEST_TOKENS:
            notes[name] = f"only {tokens} calibration tokens were routed to it"
        else:
            continue
        layer.stats = InputStats.flat(needs, layer.weight.shape[1], level, layer.weight.device, tokens)
    return notes


def check_finite(block: StreamedBlock) -> None:
    """Raises ValueError for NaN or infinity in a block's weights or inputs."""
    for name, layer in block.layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")
        stats = layer.stats
        if stats is not None and stats.tokens and not torch.isfinite(stats.norms).all():
            raise ValueError(
                f"the inputs of {name} are NaN or infinite: the model overflows in {layer.weight.dtype} on this data; load it in bfloat16 or float32"
            )
