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

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from ..model.accepted import refuse_quantized
from ..model.sparsity import model_plan
from ..plan import Plan, read_json
from .lora_layers import PEFT_TYPE, Masked, SparseLoraConfig

VERSION = 1
POSITIONS = 4096  # of each weight, whether 0 or not, go into the hash of the base's zeros

_KEEPS_BASE = (True, False, "gaussian", "orthogonal")
_REFUSED = {
    "use_dora": "DoRA rescales whole rows of W + BA by their norms, which a mask changes",
    "use_qalora": "QALoRA is for quantized bases",
    "velora_config": "VeLoRA has its own backward pass",
    "alora_invocation_tokens": "an activated LoRA cannot be merged",
    "arrow_config": "Arrow routes between adapters and cannot be merged",
    "monteclora_config": "MonteCLoRA samples its update",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA takes components out of the base weight",
    "layer_replication": "replicated layers share one base weight",
    "megatron_config": "Megatron's layers are not those of transformers",
}


def sparse_lora(
    model: PreTrainedModel | PeftModel, config: LoraConfig | HiraConfig, *, adapter_name: str = "default"
) -> PeftModel:
    """Adapters that keep the zeros of a sparse model: an ordinary `PeftModel`, for any trainer.

        model = sparse_lora(model, LoraConfig(r=16, target_modules="all-linear"))
        Trainer(model, ...).train()
        model.merge_and_unload().save_pretrained(...)      # zeros intact, the same outputs

    With a `LoraConfig` each adapted layer computes `W + M∘(s·BA)`, M being 1 where the frozen W is not 0. Merging adds
    that same update in float32, casts once and checks the zeros. Linear layers, `Conv1D`, fused experts (by
    `target_parameters`), rsLoRA, dropout, ranks and alphas by pattern, several adapters. A `HiraConfig`, whose update
    `W∘(BA)` keeps zeros by itself, is passed on to peft after the same checks.

    Args:
        model: a sparse model; or what this function returned, to add another adapter.
        config: as for peft. `target_modules="all-linear"` means the planned linear layers.
        adapter_name: of the new adapter.

    Raises:
        ValueError: a dense or quantized model, a plan that does not fit it, adapters on layers that are not in the
            plan, and variants of LoRA whose update cannot be masked, with the reason.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    planned = planned_parameters(base)
    if isinstance(config, HiraConfig):
        return _attach(model, config, adapter_name, planned)
    _check_config(config, planned)
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
    known = {f.name for f in fields(LoraConfig) if f.init}
    config = LoraConfig(**{k: v for k, v in data.items() if k in known})
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
    than the unmerged model's, since its update on dead weights is dropped: train with `sparse_lora` to lose nothing.

    Args:
        model: a `PeftModel` whose adapters are not merged.
        adapter_names: the active ones by default.

    Returns:
        The base model, without peft.

    Raises:
        ValueError: a base without zeros, quantized, or merged already.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"a PeftModel is expected, not a {type(model).__name__}")
    planned = planned_parameters(model.get_base_model())
    layers = list(_adapted(model))
    if any(layer.merged for _, layer, _ in layers):
        raise ValueError("adapters are merged already, and zeros may be gone: call model.unmerge_adapter() first")
    for name, layer, parameter in layers:
        if name not in planned or parameter is None:
            continue
        dead, dtype = parameter.detach() == 0, parameter.dtype
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        layer.merge(safe_merge=True, adapter_names=adapter_names)
        parameter.data = parameter.data.masked_fill_(dead, 0).to(dtype)
        if parameter.data[dead].any() or not torch.isfinite(parameter.data).all():
            raise RuntimeError(f"{name}: merging left weights outside the mask, or not finite ones")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*merged")  # that planned layers are merged already
        return model.merge_and_unload(adapter_names=adapter_names)


def planned_parameters(base: Any) -> dict[str, nn.Parameter]:
    """The parameters whose zeros are kept, by their names in the bare model, with or without adapters on it.

    Those of the model's plan; without a plan, every linear layer and expert stack that has zeros.

    Raises:
        ValueError: there are none, the plan does not fit, or the model is quantized.
    """
    refuse_quantized(base, "merged with an adapter")
    plan = model_plan(base)
    wanted = _plan_sizes(plan) if plan is not None else None
    found: dict[str, nn.Parameter] = {}
    for path, module in base.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}".replace(".base_layer", "")
            if parameter is None or ".lora_" in name or ".hira_" in name or ".modules_to_save." in name:
                continue
            if name in wanted if wanted is not None else _has_zeros(module, parameter):
                found[name] = parameter
    for name, size in (wanted or {}).items():
        if name not in found or found[name].numel() < size:
            raise ValueError(
                f"the plan in the model's config was made for another model: it has {size} weights in {name}, the model "
                f"{found[name].numel() if name in found else 'none'}"
            )
    if not any((parameter.detach() == 0).any() for parameter in found.values()):
        raise ValueError("the model has no zeros to keep: prune it first, or use peft's own LoRA")
    return found


def zeros_hash(planned: Mapping[str, Tensor]) -> str:
    """A hash of how many zeros each parameter has, and of whether it is 0 at `POSITIONS` places."""
    values = hashlib.sha256()
    for name, parameter in sorted(planned.items()):
        flat = parameter.detach().reshape(-1)
        sample = (flat[:: max(1, flat.numel() // POSITIONS)] == 0).to("cpu", torch.uint8)
        values.update(f"{name}{tuple(parameter.shape)}{int((flat == 0).sum())}".encode() + sample.numpy().tobytes())
    return values.hexdigest()


def _plan_sizes(plan: Plan) -> dict[str, int]:
    """Weights in each parameter of a plan; the experts of one parameter are one."""
    sizes: dict[str, int] = {}
    for name, layer in plan.layers.items():
        parameter = name.split("[")[0] if name.endswith("]") else f"{name}.weight"
        sizes[parameter] = sizes.get(parameter, 0) + layer.size
    return sizes


def _has_zeros(module: nn.Module, parameter: nn.Parameter) -> bool:
    linear = isinstance(module, (nn.Linear, Conv1D)) and parameter.ndim == 2
    return bool((linear or parameter.ndim == 3) and (parameter.detach() == 0).any())


def _check_config(config: Any, planned: Mapping[str, Any]) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"a LoraConfig or HiraConfig is expected, not a {type(config).__name__}: its update fills zeros"
        )
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"{name} does not go with a mask: {reason}. Leave it out, or merge it with merge_lora")
    if config.init_lora_weights not in _KEEPS_BASE:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights or needs data; use one of {_KEEPS_BASE}"
        )
    for name in config.modules_to_save or ():
        if any(f".{name}." in f".{parameter}" for parameter in planned):
            raise ValueError(
                f"modules_to_save={name!r} trains a pruned layer densely; leave it out, or use SparsityCallback"
            )


def _exclusions(base: Any, config: LoraConfig, planned: Mapping[str, Any]) -> Any:
    """`exclude_modules`, and with "all-linear" what the plan does not name."""
    given = config.exclude_modules
    if config.target_modules != "all-linear" or isinstance(given, str):
        return given
    names = {
        name.replace(".base_layer", "")
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    }
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    head_names = {name for name, module in base.named_modules() if module is head}
    dense = {name for name in names if f"{name}.weight" not in planned} - head_names
    return [*(given or ()), *sorted(dense)] or None


def _attach(
    model: PreTrainedModel | PeftModel, config: PeftConfig, adapter_name: str, planned: Mapping[str, Any]
) -> PeftModel:
    """Puts the adapter on, and takes it off again if it sits where it must not."""
    added = isinstance(model, PeftModel)
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; give another adapter_name")
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    wrong = []
    for name, layer, _ in _adapted(model):
        masked = isinstance(layer, Masked) or not isinstance(config, SparseLoraConfig)
        if adapter_name in _adapters(layer) and not (name in planned and masked):
            wrong.append(name.removesuffix(".weight"))
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
    """Each adapter layer: (name of its parameter in the bare model, the layer, the parameter)."""
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            attribute = getattr(layer, "parameter_name", "weight")
            parameter = layer.get_base_layer()._parameters.get(attribute)
            yield f"{path}.{attribute}".replace(".base_layer", ""), layer, parameter


def _adapters(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}
