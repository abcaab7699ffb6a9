"""What transformers is told of a model with packed weights: that it is quantized, and how it is saved."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.bitmask import codec
from ..checkpoint.packed_folder import METHOD, groups_of, is_packed, repack_into, shortest
from ..checkpoint.quantizer import BitmaskQuantizer
from ..checkpoint.transformers_internals import revert_weight_conversion
from ..files import MARKER
from ..model.sparsity import model_plan
from .install import packed_modules

_BEFORE = "_before_packing"  # what `unmark_packed` restores: {name: value}
_EXPERTS = "_experts_implementation"


def mark_packed(model: PreTrainedModel, quantizer: BitmaskQuantizer) -> None:
    """Makes a model with packed modules known as one: frozen, saved by `save_packed`, experts one by one."""
    before = {
        "frozen": {name for name, parameter in model.named_parameters() if not parameter.requires_grad},
        "experts": getattr(model.config, _EXPERTS, None),
    }
    model.requires_grad_(False)
    if before["experts"] not in (None, "eager"):
        model.set_experts_implementation("eager")  # the one that takes the experts' weights one by one
    vars(model)[_BEFORE] = before
    vars(model)["save_pretrained"] = MethodType(save_packed, model)
    told: Any = model  # these are no fields of a module
    told.hf_quantizer, told.is_quantized, told.quantization_method = quantizer, True, METHOD
    model.config.quantization_config = quantizer.quantization_config


def is_marked(model: PreTrainedModel) -> bool:
    """Returns whether a model was packed, also where all its layers turned out to be faster dense."""
    return _BEFORE in vars(model)


def unmark_packed(model: PreTrainedModel) -> None:
    """Undoes `mark_packed`, once nothing in the model is packed."""
    before = vars(model).pop(_BEFORE)
    vars(model).pop("save_pretrained", None)
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    setattr(model, "is_quantized", False)  # noqa: B010  no field of a module
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    if before["experts"] not in (None, "eager"):
        model.set_experts_implementation(before["experts"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in before["frozen"] and parameter.is_floating_point())


def checkpoint_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the state dict under the checkpoint's names: packed strings, and dense tensors as they are.

    Where the checkpoint has another form, such as a matrix for each expert, one weight at a time is unpacked, taken
    apart and packed again.
    """
    state = model.state_dict()
    groups = groups_of(model_plan(model))
    found = revert_weight_conversion(model, {name: tensor for name, tensor in state.items() if not is_packed(tensor)})
    packed = {name: module.packed for name, module in packed_modules(model)}
    for name, string in packed.items():
        shape = codec.read_header(string).shape
        trial = revert_weight_conversion(model, {name: torch.empty(shape, device="meta")})
        if len(trial) == 1 and next(iter(trial.values())).shape == shape:
            found[next(iter(trial))] = string
        else:
            parts = revert_weight_conversion(model, {name: codec.unpack(string)})
            found |= {part: shortest(tensor.contiguous(), groups)[0] for part, tensor in parts.items()}
    return found


def save_packed(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
) -> None:
    """Stands in for `save_pretrained` of a packed model: the packed layout again, as `hf_sparsity.pack` writes it.

    Files of a former save are replaced when the new ones are complete; the folder is marked as unfinished meanwhile. The options
    are those of `save_pretrained`.

    Raises:
        ValueError: options that the packed layout has no form for.
    """
    for name in ("state_dict", "variant", "distributed_checkpoint"):
        if options.pop(name, None):
            raise ValueError(f"a packed model is saved without {name}; unpack_model(model) makes it an ordinary one")
    if push_to_hub:
        raise ValueError("save the packed model into a folder, then hf_sparsity.push_sparse(folder, repository)")
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        dense, packed = Path(temporary) / "dense", Path(temporary) / "packed"
        packed.mkdir()
        type(model).save_pretrained(model, dense, **(options | {"save_original_format": False}))
        repack_into(dense, packed)
        (target / MARKER).mkdir(exist_ok=True)
        for old in target.glob("sparse*.safetensors*"):
            old.unlink()
        for file in sorted(packed.iterdir(), key=lambda file: file.name == "config.json"):
            shutil.move(file, target / file.name)
        (target / MARKER).rmdir()
