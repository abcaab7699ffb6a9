"""The layers of masked LoRA: `W + M∘(s·BA)`, where M is 1 wherever the frozen base weight W is not 0.

Everything that depends on the internals of peft 0.21 is here: a LoRA variant for `nn.Linear` and `Conv1D`, a
`ParamWrapper` for fused experts, and the mapping by which a config chooses them. The mask is never stored: it is read
from the base weight, which all adapters share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant, ParamWrapper, _LoraParameterProxy
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..core.masks import zero_
from .record import MergeRecord

# The type that is written into an adapter's config. For "LORA" stock peft would load the adapter without its mask, which
# is another function, and only warn; for a type that it does not know it raises an error with this text.
PEFT_TYPE = "SPARSE_LORA: load this adapter with hf_sparsity.load_sparse_lora(model, folder)"


@dataclass
class SparseLoraConfig(LoraConfig):
    """The `LoraConfig` that `sparse_lora` makes of the caller's: its adapters keep the zeros of the base."""

    sparse_base: dict[str, Any] | None = field(
        default=None, metadata={"help": "version, and a hash of where the base has its zeros"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Module: sparse_layer})  # type: ignore[dict-item]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `adapter_config.json`, marked so that nothing but `load_sparse_lora` takes it."""
        return super().to_dict() | {"peft_type": PEFT_TYPE}


def sparse_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """Returns the masked layer for a target module.

    None for other modules than linear ones: peft then puts its own layer there, and `sparse_lora` refuses it.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None:
        return SparseParameter(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    if not isinstance(base, (nn.Linear, Conv1D)):
        return None
    transposed = isinstance(base, Conv1D)
    layer = SparseLinear(target, adapter_name, config=config, is_target_conv_1d_layer=transposed, **kwargs)
    layer.fan_in_fan_out = transposed
    return layer


class MaskedProduct(torch.autograd.Function):
    """The product `x (M∘(s·BA))ᵀ`, without keeping BA or the mask M for the backward pass.

    Shapes: `x` `[..., in]`, `a` `[rank, in]`, `b` `[out, rank]`, `weight` (the base, 0 where M is 0) `[out, in]`, or
    `[in, out]` if `transposed`. The update is made in float32; the product with x runs in x's dtype, or autocast's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, scaling: float, transposed: bool) -> Tensor:
        """Returns the product `[..., out]`, in the dtype it was computed in."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.save_for_backward(x, a, b, weight)
        ctx.scaling, ctx.transposed, ctx.dtype = scaling, transposed, dtype
        with torch.autocast(kind, enabled=False):
            pruned = (weight == 0).T if transposed else weight == 0
            delta = zero_(outer(b, a, scaling), pruned).to(dtype)
            return F.linear(x.to(dtype), delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Computes the masked update again; returns gradients in the dtypes of x, A and B."""
        x, a, b, weight = ctx.saved_tensors
        pruned = (weight == 0).T if ctx.transposed else weight == 0
        outputs = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            delta = zero_(outer(b, a, ctx.scaling), pruned).to(ctx.dtype)
            grad_x = (outputs @ delta).to(x.dtype).reshape(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            inputs = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            wide = torch.promote_types(a.dtype, torch.float32)
            update = zero_(outputs.T @ inputs, pruned).to(wide).mul_(ctx.scaling)
            grad_a = (b.to(wide).T @ update).to(a.dtype)
            grad_b = (update @ a.to(wide).T).to(b.dtype)
        return grad_x, grad_a, grad_b, None, None, None


class MaskedSum(torch.autograd.Function):
    """The sum `weight + M∘(s·left right)`, without keeping the update or the mask M for the backward pass.

    Shapes: `left` `[..., rows, rank]`, `right` `[..., rank, columns]`, `weight` and `base` `[..., rows, columns]`; M is 1
    where `base` is not 0. The sum is made in float32 and cast once.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, base: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
        """Returns the sum, in the weight's dtype."""
        ctx.save_for_backward(base, left, right)
        ctx.scaling = scaling
        with torch.autocast(weight.device.type, enabled=False):
            return zero_(outer(left, right, scaling), base == 0).add_(weight).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Returns gradients in the dtypes of the factors."""
        base, left, right = ctx.saved_tensors
        wide = torch.promote_types(left.dtype, torch.float32)
        update = grad.masked_fill(base == 0, 0).to(wide).mul_(ctx.scaling)
        grad_left = (update @ right.to(wide).mT).to(left.dtype)
        grad_right = (left.to(wide).mT @ update).to(right.dtype)
        return (grad if ctx.needs_input_grad[0] else None), None, grad_left, grad_right, None


def outer(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Returns `scaling * left @ right` in float32 (or wider)."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).mul_(scaling)


class Masked:
    """The common part of masked layers: their base parameter, their update, merging and unmerging it.

    Merging adds the updates of all adapters in float32, casts once, and checks that no weight outside the mask is left.
    """

    merge_record: MergeRecord | None = None  # set by `sparse_lora`

    def base_parameter(self) -> nn.Parameter:
        """Returns the frozen weight, as it is stored."""
        raise NotImplementedError

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Returns (left, right), whose product is the adapter's update in the base's layout, without mask and scale."""
        raise NotImplementedError

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Returns (B, A) of an adapter, as peft stores them."""
        return self.lora_B[adapter].weight, self.lora_A[adapter].weight  # type: ignore[attr-defined]

    def pruned(self) -> Tensor:
        """Returns bool, True where the base is 0; remembered while merged, when a survivor could have become 0."""
        remembered = self._caches.get("pruned")  # type: ignore[attr-defined]
        return self.base_parameter().detach() == 0 if remembered is None else remembered

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the masked update in the base parameter's layout, float32."""
        left, right = self.factors(adapter)
        delta = outer(left, right, self.scaling[adapter]).to(self.base_parameter().device)  # type: ignore[attr-defined]
        return zero_(delta, self.pruned())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters (by default the active ones) to the base; always as safely as `safe_merge`."""
        chosen = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        names = [name for name in chosen or () if name in self.lora_A]  # type: ignore[attr-defined]
        if names:
            pruned = self.pruned()
            self._shift(names, 1, pruned)
            self._caches["pruned"] = pruned  # type: ignore[attr-defined]
            self.merged_adapters.extend(names)  # type: ignore[attr-defined]
            if self.merge_record is not None:
                self.merge_record.merged()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes all merged adapters out of the base, up to rounding in its dtype."""
        names = list(self.merged_adapters)  # type: ignore[attr-defined]
        if names:
            self._shift(names, -1, self.pruned())
            del self._caches["pruned"]  # type: ignore[attr-defined]
            self.merged_adapters.clear()  # type: ignore[attr-defined]
            if self.merge_record is not None:
                self.merge_record.unmerged()

    def _shift(self, names: list[str], sign: int, pruned: Tensor) -> None:
        parameter = self.base_parameter()
        wide = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        for name in names:
            wide.add_(self.get_delta_weight(name), alpha=sign)
        shifted = wide.to(parameter.dtype)
        if not torch.isfinite(shifted).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinite weights in {parameter.dtype}")
        if shifted[pruned].any():
            raise RuntimeError(f"merging {', '.join(names)} left weights outside the mask")
        parameter.data.copy_(shifted)
        bias = getattr(self.get_base_layer(), "bias", None)  # type: ignore[attr-defined]
        for name in names:
            if self.lora_bias[name]:  # type: ignore[attr-defined]
                if bias is None:
                    raise ValueError("lora_bias=True cannot be merged: the base layer has no bias")
                bias.data += sign * self.lora_B[name].bias * self.scaling[name]  # type: ignore[attr-defined]


class MaskedVariant(LoraVariant):
    """The forward of masked LoRA; `Masked` merges it."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Does nothing: A and B are all that is needed."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns `result + dropout(x) (M∘(s·BA))ᵀ`."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        weight = module.get_base_layer().weight
        update = MaskedProduct.apply(x, a.weight, b.weight, weight, scaling, module.fan_in_fan_out)
        if b.bias is not None:
            update = update + b.bias * scaling
        return result + update

    def supports_lora_conversion(self) -> bool:
        """Returns False: a masked update has full rank, so it cannot become a plain LoRA."""
        return False


class SparseLinear(Masked, Linear):
    """Masked LoRA on `nn.Linear` or `Conv1D`."""

    def base_parameter(self) -> nn.Parameter:
        """Returns the weight of the base layer."""
        return cast(nn.Parameter, self.get_base_layer().weight)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Returns (left, right), whose product is the adapter's update in the base parameter's layout."""
        left, right = self.matrices(adapter)
        return (right.T, left.T) if self.fan_in_fan_out else (left, right)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
        """Returns the masked variant; raises ValueError for a plain LoRA config."""
        _check_config(config)
        return MaskedVariant()


class SparseParameter(Masked, ParamWrapper):  # type: ignore[misc]
    """Masked LoRA on a parameter named in `target_parameters`, such as fused experts `[experts, ·, ·]`.

    While the base's forward runs, the parameter reads as the sum with its masked update. That sum is kept until the
    backward pass, as with stock peft; checkpoint activations if it is too large.
    """

    def base_parameter(self) -> Any:
        """Returns the base's own parameter, beneath any parametrisation."""
        base, name = self.get_base_layer(), self.parameter_name
        stored: Any = base.parametrizations if parametrize.is_parametrized(base, name) else None
        return base._parameters[name] if stored is None else stored[name].original

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Returns (left, right), whose product is the adapter's update in the base parameter's layout."""
        left, right = self.matrices(adapter)
        if self._param_ndim == 2:
            return left, right
        right = right.reshape(self.num_experts, -1, right.shape[-1])  # [experts, rank, in]
        left = left.reshape(left.shape[0], -1, self.num_experts).permute(2, 0, 1)  # [experts, out, rank]
        return (left, right) if self._did_swap_in_out_features else (right.mT, left.mT)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        """Returns None, since peft allows no variant on parameters; raises ValueError for a plain LoRA config."""
        _check_config(config)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters or () if name in self.lora_A]
        if not names:
            yield
            return
        base, name = self.get_base_layer(), self.parameter_name
        trains = self.base_parameter().requires_grad
        proxy = _Effective([(*self.factors(n), self.scaling[n]) for n in names])
        parametrize.register_parametrization(base, name, proxy, unsafe=True)
        self.base_parameter().requires_grad_(trains)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()


# peft recognises nested wrappers, one for each parameter of a module, by the name of their class.
SparseParameter.__name__ = "ParamWrapper"


class _Effective(_LoraParameterProxy):
    """The parametrization by which the parameter reads as the sum while the base's forward runs."""

    def __init__(self, updates: list[tuple[Tensor, Tensor, float]]):
        nn.Module.__init__(self)
        self.updates = updates

    def forward(self, base: Tensor) -> Tensor:
        weight = base
        for left, right, scaling in self.updates:
            weight = MaskedSum.apply(weight, base, left, right, scaling)
        return weight


def _check_config(config: LoraConfig) -> None:
    if not isinstance(config, SparseLoraConfig):
        raise ValueError(
            "a plain LoRA adapter on a model with masked ones would fill its zeros: add it by "
            "sparse_lora(model, config, adapter_name=...), or load_sparse_lora(model, folder, adapter_name=...)"
        )
