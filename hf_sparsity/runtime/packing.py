"""Models in memory, packed and unpacked in place: `pack_model` and `unpack_model`."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.packed_folder import groups_of
from ..model.accepted import check_model
from ..model.sparsity import model_plan, planned_layers
from .choose import show_speeds, unpack_slow_layers
from .install import install, pack_rows, packed_modules, uninstall
from .loading import packed_quantizer
from .state import is_marked, mark_packed, unmark_packed

logger = logging.getLogger(__name__)


def pack_model(model: PreTrainedModel, *, prefer: str = "memory") -> PreTrainedModel:
    """Packs the sparse layers of a model in memory, in place: bits and kept values instead of zeros, one layer at a time.

    The class stays what it was. Each `nn.Linear` or `Conv1D` with enough zeros becomes a `PackedLinear`, each parameter of
    fused experts a `PackedExperts`; embeddings, norms, head and dense layers stay as they are. All parameters are frozen:
    packed weights cannot be trained.

    Args:
        model: a sparse model, such as one that `prune` has pruned.
        prefer: "memory" packs all that becomes smaller; "speed" measures each kind of layer and leaves those dense that
            are multiplied faster so, see `layer_speeds`.

    Returns:
        The model.

    Raises:
        ValueError: what `check_model` refuses, an unknown `prefer`, offloaded weights, or no layer with enough zeros.
    """
    quantizer = packed_quantizer(prefer)
    check_model(model, "packed")
    groups = groups_of(model_plan(model))
    owners: dict[tuple[int, str], tuple[str, nn.Module, str, bool]] = {}
    for weight in planned_layers(model).weights.values():
        place = (id(weight.module), weight.attribute)
        owners.setdefault(place, (weight.parameter, weight.module, weight.attribute, weight.transposed))
    strings = 0
    for path, module, attribute, transposed in owners.values():
        parameter = module._parameters[attribute]
        assert parameter is not None
        if parameter.device.type == "meta":
            raise ValueError(f"{path} is offloaded; load the model without a device_map that offloads to pack it")
        packed = pack_rows(parameter.detach(), transposed, groups)
        if packed is not None:
            install(model, path, packed, dtype=parameter.dtype)
            strings += 1
    if not strings:
        raise ValueError(
            "no layer of the model has enough zeros to be worth packing: prune it first (hf_sparsity.prune)"
        )
    mark_packed(model, quantizer)
    if prefer == "speed":
        logger.info("%s", show_speeds(unpack_slow_layers(model)))
    return model


def unpack_model(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a packed model an ordinary one again, in place, one layer at a time; its parameters can be trained.

    Returns:
        The model, with the weights that were packed, bit for bit, in the model's dtype.

    Raises:
        ValueError: nothing in the model is packed.
    """
    found = list(packed_modules(model))
    if not is_marked(model):
        raise ValueError(f"nothing in this {type(model).__name__} is packed")
    for name, module in found:
        uninstall(model, name, module)
    unmark_packed(model)
    return model
