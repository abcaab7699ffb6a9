"""LoRA for sparse models: adapters that keep every zero, and merges that do.

A stock LoRA merged into a sparse model fills it: BA is dense. `sparse_lora` trains the update that will be merged,
`W + M∘(s·BA)`; `merge_lora` masks a stock adapter when it is merged, which changes the function it learned.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from ..model.accepted import check_kind, refuse_quantized
from ..model.sparsity import model_plan
from ..plan import Plan, read_json
from .lora_configs import changed_base, check_config
from .lora_layers import PEFT_TYPE, Masked, SparseLoraConfig
from .record import MergeRecord, record_merge

VERSION = 1
POSITIONS = 4096  # values of each parameter that the hash of the base's zeros looks at


def sparse_lora(
    model: PreTrainedModel | PeftModel, config: LoraConfig | HiraConfig, *, adapter_name: str = "default"
) -> PeftModel:
    """Returns a model with adapters that keep its zeros: an ordinary `PeftModel`, for any trainer.

        model = sparse_lora(model, LoraConfig(r=16, target_modules="all-linear"))
        Trainer(model, ...).train()
        model.merge_and_unload().save_pretrained(...)      # zeros intact, the same outputs

    With a `LoraConfig` each adapted layer computes `W + M∘(s·BA)`, M being 1 where the frozen W is not 0. Merging adds
    that same update in float32, casts once and checks the zeros. This works for linear layers, `Conv1D` and fused experts
    (by `target_parameters`), with rsLoRA, dropout, ranks and alphas by pattern, and several adapters. A `HiraConfig`,
    whose update `W∘(BA)` keeps zeros by itself, is passed on to peft after the same checks.

    Args:
        model: a sparse model; or what this function returned, to add another adapter.
        config: as for peft. `target_modules="all-linear"` means the planned linear layers.
        adapter_name: of the new adapter.

    Raises:
        ValueError: a dense or quantized model, a plan that does not fit it, adapters on layers that are not in the
            plan, and other adapters than these, with the reason and what to do instead.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_kind(base)
    planned = planned_parameters(base)
    check_config(config, planned)
    if isinstance(config, HiraConfig):
        return _attach(model, config, adapter_name, planned)
    values = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init and hasattr(config, f.name)}
    values["exclude_modules"] = _exclusions(base, config, planned)
    mark = {"version": VERSION, "zeros": zeros_hash(planned)}
    return _attach(model, SparseLoraConfig(**values, sparse_base=mark), adapter_name, planned)


def load_sparse_lora(
    model: PreTrainedModel | PeftModel,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **location: Any,
) -> PeftModel:
    """Puts a saved masked adapter on the sparse model it was trained on; stock peft refuses to load it.

    Args:
        model: the base, or a `PeftModel` from `sparse_lora` to add the adapter to.
        folder: where `PeftModel.save_pretrained` or the Trainer put the adapter; or its Hub id.
        is_trainable: whether to go on training it.
        location: `revision`, `subfolder`, `token`, ... as for `from_pretrained`.

    Raises:
        ValueError: the folder holds another kind of adapter, or the model has its zeros elsewhere than the adapter's base.
    """
    data = dict(read_json(str(cached_file(folder, "adapter_config.json", **location))))
    mark = data.pop("sparse_base", None)
    if data.pop("peft_type", None) != PEFT_TYPE or not isinstance(mark, Mapping):
        raise ValueError(f"{folder} holds no masked adapter; load it with PeftModel.from_pretrained(model, folder)")
    if mark.get("version") != VERSION:
        raise ValueError(
            f"the adapter has version {mark.get('version')!r}; this release of hf_sparsity reads {VERSION}"
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if mark.get("zeros") != zeros_hash(planned_parameters(base)):
        raise ValueError(
            "the adapter was trained on a model with its zeros elsewhere: its mask would be another. Load the sparse "
            f"model it belongs to ({data.get('base_model_name_or_path') or 'not named in its config'})"
        )
    options = {f.name for f in fields(LoraConfig) if f.init}
    config = LoraConfig(**{k: v for k, v in data.items() if k in options})
    config.inference_mode = not is_trainable
    peft_model = sparse_lora(model, config, adapter_name=adapter_name)
    cached_file(folder, "adapter_model.safetensors", **location)  # or an error here: nothing is unpickled
    result = peft_model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable, **location)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(f"{folder} lacks {result.missing_keys[:3]} and has unknown {result.unexpected_keys[:3]}")
    return peft_model


@torch.no_grad()
def merge_lora(model: PeftModel, *, adapter_names: list[str] | None = None) -> Any:
    """Merges adapters (stock LoRA, DoRA, ... or ours) into their sparse base, keeping every zero.

    Each layer is merged in float32, masked, cast once, and checked. For a stock adapter the result is another function
    than the unmerged model's, since its update on pruned weights is dropped: train with `sparse_lora` to lose nothing.
    Copies of pruned layers that `modules_to_save` trained densely are masked too.

    Args:
        model: a `PeftModel` whose adapters are not merged.
        adapter_names: the adapters to merge; by default the active ones.

    Returns:
        The base model, without peft.

    Raises:
        ValueError: a base without zeros, quantized, or merged already; adapters that changed the base's zeros when they
            were put on, or that cannot be merged.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"a PeftModel is expected, not a {type(model).__name__}")
    kinds = ", ".join(sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}))
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"{kinds} has nothing to merge: the base's weights are as they were. Publish the adapter beside the sparse base"
        )
    planned = planned_parameters(model.get_base_model(), changed_base(model.peft_config))
    layers = list(_adapted(model))
    if any(layer.merged for _, layer, _ in layers):
        raise ValueError("adapters are merged already, and zeros may be gone: call model.unmerge_adapter() first")
    zeros = {name: np.packbits((parameter.detach() == 0).cpu().numpy()) for name, parameter in planned.items()}
    try:
        for name, layer, parameter in layers:
            if name in planned and parameter is not None:
                _merge_layer(name, layer, parameter, adapter_names)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*merged")  # that planned layers are merged already
            result = model.merge_and_unload(adapter_names=adapter_names)
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"peft cannot merge {kinds}: {str(error) or 'it has no way to'}") from error
    _mask(result, zeros)
    if not any(isinstance(layer, Masked) for _, layer, _ in layers):  # these recorded it themselves
        record_merge(result, kinds)
    return result


def _merge_layer(name: str, layer: Any, parameter: nn.Parameter, adapter_names: list[str] | None) -> None:
    zeros, dtype = parameter.detach() == 0, parameter.dtype
    parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    layer.merge(safe_merge=True, adapter_names=adapter_names)
    parameter.data = parameter.data.masked_fill_(zeros, 0).to(dtype)
    if parameter.data[zeros].any() or not torch.isfinite(parameter.data).all():
        raise RuntimeError(f"{name}: merging left weights outside the mask, or not finite ones")


def _mask(model: Any, zeros: Mapping[str, np.ndarray]) -> None:
    """Makes weights 0 that were before the merge, for adapters that keep or remake the weight outside their layer."""
    for name, bits in zeros.items():
        parameter = model.get_parameter(name)
        flags = np.unpackbits(bits, count=parameter.numel()).astype(bool)
        parameter.data.masked_fill_(torch.from_numpy(flags).reshape(parameter.shape).to(parameter.device), 0)


def planned_parameters(base: Any, changed: str = "") -> dict[str, nn.Parameter]:
    """Returns the parameters whose zeros are kept, by their names in the bare model, with or without adapters on it.

    These are those of the model's plan; without a plan, every linear layer and expert stack that has zeros.

    Args:
        base: the transformers model.
        changed: what is known to have changed the base's weights, for the error message.

    Raises:
        ValueError: there are none, the plan does not fit, zeros are missing, or the model is quantized.
    """
    refuse_quantized(base, "merged with an adapter")
    plan = model_plan(base)
    sizes = _plan_sizes(plan) if plan is not None else None
    parameters: dict[str, nn.Parameter] = {}
    for path, module in base.named_modules():
        for attribute, parameter in module._parameters.items():
            name = _bare(f"{path}.{attribute}")
            if parameter is None or ".lora_" in name or ".hira_" in name or ".modules_to_save." in name:
                continue
            if name in sizes if sizes is not None else _has_zeros(module, parameter):
                parameters[name] = parameter
    for name, size in (sizes or {}).items():
        if name not in parameters or parameters[name].numel() < size:
            raise ValueError(
                f"the plan in the model's config was made for another model: it has {size} weights in {name}, the model "
                f"{parameters[name].numel() if name in parameters else 'none'}"
            )
    if changed and not all((parameters[name].detach() == 0).any() for name in parameters):
        raise ValueError(
            f"{changed} changed the base weights when the adapter was put on, so the base's zeros are gone. Load the sparse "
            "model again, and put on sparse_lora(model, LoraConfig(...)) with the default init_lora_weights"
        )
    if not any((parameter.detach() == 0).any() for parameter in parameters.values()):
        raise ValueError("the model has no zeros to keep: prune it first, or use peft's own LoRA")
    return parameters


def _bare(name: str) -> str:
    """Returns a parameter's name without what peft puts around layers."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def zeros_hash(planned: Mapping[str, Tensor]) -> str:
    """Returns a hash of how many zeros each parameter has, and of whether it is 0 at `POSITIONS` places."""
    values = hashlib.sha256()
    for name, parameter in sorted(planned.items()):
        flat = parameter.detach().reshape(-1)
        sample = (flat[:: max(1, flat.numel() // POSITIONS)] == 0).to("cpu", torch.uint8)
        values.update(f"{name}{tuple(parameter.shape)}{int((flat == 0).sum())}".encode() + sample.numpy().tobytes())
    return values.hexdigest()


def _plan_sizes(plan: Plan) -> dict[str, int]:
    """Returns the number of planned weights in each parameter; the experts of one parameter are added up."""
    sizes: dict[str, int] = {}
    for name, layer in plan.layers.items():
        parameter = name.split("[")[0] if name.endswith("]") else f"{name}.weight"
        sizes[parameter] = sizes.get(parameter, 0) + layer.size
    return sizes


def _has_zeros(module: nn.Module, parameter: nn.Parameter) -> bool:
    linear = isinstance(module, (nn.Linear, Conv1D)) and parameter.ndim == 2
    return bool((linear or parameter.ndim == 3) and (parameter.detach() == 0).any())


def _exclusions(base: Any, config: LoraConfig, planned: Mapping[str, Any]) -> Any:
    """Returns the config's `exclude_modules`, and with "all-linear" also the linear layers that the plan left dense."""
    excluded = config.exclude_modules
    if config.target_modules != "all-linear" or isinstance(excluded, str):
        return excluded
    names = {
        name.replace(".base_layer", "")
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    }
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    head_names = {name for name, module in base.named_modules() if module is head}
    dense = {name for name in names if f"{name}.weight" not in planned} - head_names
    return [*(excluded or ()), *sorted(dense)] or None


def _attach(
    model: PreTrainedModel | PeftModel, config: PeftConfig, adapter_name: str, planned: Mapping[str, Any]
) -> PeftModel:
    """Puts an adapter on, and takes it off again if it sits on a layer without mask."""
    added = isinstance(model, PeftModel)
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; give another adapter_name")
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    wrong = []
    records = [
        layer.merge_record for _, layer, _ in _adapted(model) if isinstance(layer, Masked) and layer.merge_record
    ]
    record = records[0] if records else MergeRecord(model.get_base_model())
    for name, layer, _ in _adapted(model):
        if isinstance(layer, TrainableTokensLayer) and name not in planned:
            continue  # new rows of an embedding, which has no mask
        masked = isinstance(layer, Masked) or not isinstance(config, SparseLoraConfig)
        if adapter_name in _adapters(layer) and not (name in planned and masked):
            wrong.append(name.removesuffix(".weight"))
        if isinstance(layer, Masked):
            layer.merge_record = record
    if wrong:
        if added:
            model.delete_adapter(adapter_name)
        else:
            model.unload()
        raise ValueError(
            f"{len(wrong)} of the adapted layers are not in the sparsity plan, such as {wrong[0]}: they have no mask. "
            "Choose target_modules among the planned layers, or name these in exclude_modules"
        )
    return model


def _adapted(model: PeftModel) -> Iterator[tuple[str, Any, nn.Parameter | None]]:
    """Yields (name of its parameter in the bare model, the layer, the parameter) for each adapter layer."""
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            attribute = getattr(layer, "parameter_name", "weight")
            parameter = layer.get_base_layer()._parameters.get(attribute)
            yield _bare(f"{path}.{attribute}").replace(".token_adapter", ""), layer, parameter


def _adapters(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}
