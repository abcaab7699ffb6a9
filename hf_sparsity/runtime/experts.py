"""Fused experts whose weights are packed: what stands in place of a parameter `[experts, ., .]`, and of one expert of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .linear import Packed

_LINEAR = {functional.linear}
_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}


class PackedExperts(Packed):
    """The packed weights of all experts; `experts[number]` is one that `linear` and `@` multiply with.

    It stands where the parameter stood, so transformers' own loop over the experts runs as it is.
    """

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter, `[experts, ., .]`."""
        return torch.Size(self.header.shape)

    @property
    def device(self) -> torch.device:
        """The device of the packed bytes."""
        return self.packed.device

    def __getitem__(self, number: Any) -> PackedExpert:
        return PackedExpert(self, int(number))

    def stands_for(self, name: str) -> str:
        """Returns the parameter's name, which is the module's."""
        return name

    def extra_repr(self) -> str:
        """Returns the shape and the size in memory."""
        share = 100 * self.packed.numel() / (self.shape.numel() * self.header.dtype.itemsize)
        return f"{tuple(self.shape)}, {share:.1f} % of dense"


class PackedExpert:
    """The packed weight of one expert, in products where a tensor would stand; in all else it is unpacked first."""

    def __init__(self, experts: PackedExperts, number: int) -> None:
        self.experts, self.number = experts, number
        self.shape = experts.shape[1:]
        self.dtype, self.device = experts.dtype, experts.device

    def dense(self) -> Tensor:
        """Returns the expert's weight, in the model's shape and dtype."""
        rows = self.experts.rows.dense(self.number)
        return (rows.T if self.experts.header.swapped else rows).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        kinds: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiplies by the packed rows where they lie the right way: `linear(x, W)` for `[out, in]`, `x @ W` for `[in, out]`."""
        options = dict(options or {})
        if len(arguments) > 1 and isinstance(arguments[1], PackedExpert) and isinstance(arguments[0], Tensor):
            x, weight, *bias = arguments
            swapped = weight.experts.header.swapped
            if (function in _LINEAR and not swapped) or (function in _MATMUL and swapped and x.ndim > 1):
                return weight.experts.product(x, bias[0] if bias else options.get("bias"), weight.number)
        dense = [one.dense() if isinstance(one, PackedExpert) else one for one in arguments]
        named = {name: one.dense() if isinstance(one, PackedExpert) else one for name, one in options.items()}
        return function(*dense, **named)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[arg-type]

    @property
    def T(self) -> Tensor:
        """The dense weight, transposed."""
        return self.dense().T
