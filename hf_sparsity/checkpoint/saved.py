"""Whether a folder holds a model that is in memory, as after a job that was started again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..model.layers import place_of
from ..plan import read_json
from .conversion import some
from .locate import find_stored_of
from .safetensors_index import Stored, opened
from .transformers_internals import revert_weight_conversion

logger = logging.getLogger(__name__)


def is_saved(model: PreTrainedModel, folder: Path, layout: str) -> bool:
    """Returns whether a folder holds this sparse model already, in this layout: its plan, its class and every bit.

    False where it holds nothing, or no sparse model, and for a model that is quantized or not all in memory.

    Raises:
        ValueError: the folder holds another sparse model; the message says what differs.
    """
    if not (folder / CONFIG_NAME).is_file() or getattr(model, "hf_quantizer", None) is not None:
        return False
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values()):
        return False
    described = read_json(folder / CONFIG_NAME)
    if not isinstance(described, dict) or "sparsity_config" not in described:
        return False
    if differs := _difference(model, folder, described, layout):
        raise ValueError(
            f"output {str(folder)!r} holds another sparse model: {differs}. Choose another folder, or remove it"
        )
    logger.info("%s holds the model already", folder)
    return True


def _difference(model: PreTrainedModel, folder: Path, described: dict[str, Any], layout: str) -> str:
    """Says what tells the model of a folder from one in memory; "" if nothing does."""
    plan = json.loads(json.dumps(getattr(model.config, "sparsity_config", None)))
    facts = {
        "class": (described.get("architectures"), [type(model).__name__]),
        "plan or record": (described["sparsity_config"], plan),
        "layout": ("bitmask" if described.get("quantization_config") else "dense", layout),
    }
    if other := [name for name, (there, here) in facts.items() if there != here]:
        return f"another {' and '.join(other)}"
    stored = find_stored_of(folder, model, described)
    named: dict[str, Tensor] = revert_weight_conversion(model, dict(model.state_dict()))
    both = sorted(named.keys() & stored.keys())
    places = {place_of(named[name]) for name in both}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    differing = [name for name in named.keys() - stored.keys() - ignored if place_of(named[name]) not in places]
    differing += [name for name, tensor in _read(stored, both) if not _equal(named[name], tensor)]
    return f"other values of {some(differing)}" if differing else ""


def _read(stored: Mapping[str, Stored], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors one by one; packed ones are opened alone, since opening unpacks them."""
    packed = [name for name in names if stored[name].packed]
    with opened(stored, [name for name in names if not stored[name].packed]) as slices:
        for name, part in slices.items():
            yield name, part[...]
    for name in packed:
        with opened(stored, [name]) as slices:
            yield name, slices[name]


def _equal(here: Tensor, there: Tensor) -> bool:
    return here.dtype == there.dtype and here.shape == there.shape and torch.equal(here.detach().cpu(), there)
