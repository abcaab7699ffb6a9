"""Plans that were made on one model and are carried out on another of the same shapes, such as a fine-tuned sibling.

Before anything is pruned, such a plan is compared with uniform on a small slice of the calibration text.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Pattern, Pruner
from ..calibration.batches import batch_tokens, data_fingerprint
from ..checkpoint.atomic import write_tensors
from ..core.stats import STATS
from ..evaluation.certificate import compare
from ..evaluation.divergence import DenseReference, PlanScores
from ..model.inference import Batch
from ..model.layers import Block, ModelLayers
from ..plan import LayerPlan, Plan
from ..records import Comparison
from ..streaming.fallback import fall_back
from ..streaming.run import PassOptions, Progress
from ..streaming.stream import stream_blocks
from .budget import meet

logger = logging.getLogger(__name__)

JUDGED = 2048  # tokens on which the two plans are compared, at least
SCORED = 16384  # tokens on which weights are scored, at most


def made_on_other_weights(plan: Plan, model: Mapping[str, Any]) -> bool:
    """Returns whether the plan was made on other weights than those of this fingerprint; False where either is not known."""
    made, now = plan.model.get("weights"), model.get("weights")
    return made is not None and now is not None and made != now


def revalidate(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    plan: Plan,
    pruner: Pruner,
    data: Sequence[Batch],
    folder: Path | None = None,
) -> dict[str, Any] | None:
    """Compares the plan with uniform by the masks that the pruner would choose on this model, which is left as it is.

    It costs a pass over 16k tokens and three over 2k. The masks of both plans, a quarter of a byte a weight, are kept on
    disk meanwhile. Row sparsities are ignored on both sides.

    Args:
        data: calibration batches; the last of them judge, about 2k tokens, and the others score the weights.
        folder: where the masks may wait; by default the system's place for temporary files.

    Returns:
        What `certificate.compare` gives, with `"pays"`: True, False, or None where the two cannot be told apart;
        `"made_on"`, the name of the plan's model; and `"data"`, what judged. None where nothing can be said: a uniform
        plan, inputs that are no text, fewer than four sequences.
    """
    sizes = {name: weight.size for name, weight in model_layers.weights.items()}
    pattern = Pattern.parse(plan.config.get("pattern", "unstructured"))
    even = meet(dict.fromkeys(sizes, plan.target), sizes, plan.target, pattern)
    uniform = {n: replace(plan.layers[n], sparsity=s, pattern=str(pattern.at(s))) for n, s in even.items()}
    if all(abs(plan.layers[name].sparsity - even[name]) < 1e-6 for name in sizes):
        return None
    text = [batch for batch in data if {"input_ids", "decoder_input_ids"} & batch.keys()]
    if len(text) < 4:
        logger.warning("%s, and it was not checked whether it still pays: that takes four sequences", _origin(plan))
        return None
    judging = _last(text)
    scoring = _first(text[: -len(judging)])
    reference = DenseReference(model, model_layers, judging)
    with tempfile.TemporaryDirectory(prefix="masks_", dir=folder) as place:
        _write_masks(model, model_layers, (uniform, plan.layers), pruner, scoring, Path(place))
        scores = [PlanScores.of(reference.rows(_masks(model_layers, Path(place), side))) for side in range(2)]
    compared = compare(*scores, seed=int(plan.config.get("seed", 0)))
    pays = compared.pays
    record = compared.to_dict() | {
        "pays": pays,
        "made_on": str(plan.model.get("name") or ""),
        "data": data_fingerprint(judging),
    }
    logger.log(logging.INFO if pays else logging.WARNING, "%s", verdict(record))
    return record


def verdict(record: Mapping[str, Any]) -> str:
    """Returns the result of `revalidate` as a sentence."""
    compared = Comparison.from_dict(record)
    says = {
        True: "it still pays",
        False: "it does harm here: plan anew, or prune uniformly",
        None: "it cannot be told from uniform here: plan anew, or prune uniformly",
    }
    return (
        f"the plan was made on other weights ({record['made_on'] or 'unnamed'}); on {compared.predictions} predictions of "
        f"calibration text {compared.lines()[0]}: {says[record['pays']]}"
    )


def _origin(plan: Plan) -> str:
    return f"the plan was made on other weights ({plan.model.get('name') or 'unnamed'})"


def _last(data: Sequence[Batch]) -> list[Batch]:
    """Returns the last batches with at least JUDGED tokens together; between two batches and half of all."""
    count = 2
    while count < len(data) // 2 and sum(map(batch_tokens, data[-count:])) < JUDGED:
        count += 1
    return list(data[-count:])


def _first(data: Sequence[Batch]) -> list[Batch]:
    count = 1
    while count < len(data) and sum(map(batch_tokens, data[:count])) < SCORED:
        count += 1
    return list(data[:count])


def _write_masks(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    sides: Sequence[Mapping[str, LayerPlan]],
    pruner: Pruner,
    scoring: Sequence[Batch],
    place: Path,
) -> None:
    """Writes one file for each block: the masks of both sides, as bits."""
    needs, run = pruner.needs & STATS, PassOptions()
    batches = scoring if needs else []
    stream = stream_blocks(model, model_layers, batches, needs, rewrites=False, run=run)
    for block in Progress("Checking the plan", model_layers, run, batches).over(stream):
        fall_back(block, model_layers, needs)
        bits: dict[str, Tensor] = {}
        for name, layer in block.layers.items():
            scores = pruner.scores(layer)
            for side, plan in enumerate(sides):
                layer.sparsity, layer.pattern = plan[name].sparsity, Pattern.parse(plan[name].pattern)
                if layer.sparsity:
                    mask = pruner.mask(layer, scores).cpu().numpy()
                    bits[f"{side}.{name}"] = torch.from_numpy(np.packbits(mask))
        write_tensors(place / f"{block.index}.safetensors", bits)


def _masks(model_layers: ModelLayers, place: Path, side: int) -> Callable[[Block], dict[str, Tensor]]:
    """Returns masks as `DenseReference.rows` takes them."""
    numbers = {block.name: index for index, block in enumerate(model_layers.blocks)}

    def masks(block: Block) -> dict[str, Tensor]:
        if not block.weights:
            return {}
        bits = load_file(place / f"{numbers[block.name]}.safetensors")
        return {
            name: torch.from_numpy(np.unpackbits(bits[f"{side}.{name}"].numpy(), count=weight.size))
            .bool()
            .view(weight.shape)
            for name, weight in block.weights.items()
            if f"{side}.{name}" in bits
        }

    return masks
