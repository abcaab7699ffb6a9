"""`PackedLinear`: a linear layer that holds its weight as packed bytes and multiplies with them as they are."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..checkpoint.bitmask import codec
from .rows import PackedRows, with_room

NO_TRAINING = (
    "packed weights cannot be trained: there is no gradient through them. hf_sparsity.unpack_model(model) makes the model "
    "dense; call a packed one under torch.no_grad()"
)
_ready: WeakValueDictionary[int, PackedRows] = WeakValueDictionary()  # by the address of the packed bytes


def rows_of(packed: Tensor) -> PackedRows:
    """Returns a packed string made ready for products; the same object as long as somebody has it."""
    rows = _ready.get(packed.data_ptr())
    if rows is None or rows.packed.numel() != packed.numel():
        rows = PackedRows(with_room(packed))
        if rows.address:
            _ready[rows.address] = rows
    return rows


@torch.library.custom_op("hf_sparsity::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, expert: int) -> Tensor:
    """Multiplies `x` with a packed matrix; `torch.compile` takes it as one operation."""
    return rows_of(packed).multiply(x, bias, expert)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, expert: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


class Packed(nn.Module):
    """What modules with a packed weight share: its bytes as a buffer, named in the state dict like the weight itself.

    `packed` is a string of `checkpoint/bitmask/codec.py` whose rows are output units. Its values keep their dtype
    whatever the model is cast to; `dtype` is the model's.
    """

    packed: Tensor
    like: Tensor

    def __init__(self, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("packed", with_room(packed), persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.device), persistent=False)
        self.header = codec.read_header(packed)
        self._rows: PackedRows | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight has when it is unpacked."""
        return self.like.dtype

    @property
    def rows(self) -> PackedRows:
        """The packed bytes made ready for products, again after they were moved or replaced."""
        packed, rows = self._buffers["packed"], self._rows
        assert packed is not None
        if rows is None or rows.address != packed.data_ptr():
            rows = self._rows = rows_of(packed)
            self._buffers["packed"] = rows.packed
        return rows

    def dense(self) -> Tensor:
        """Returns the weight unpacked, in the model's shape and dtype."""
        return self.rows.dense().to(self.dtype)

    def product(self, x: Tensor, bias: Tensor | None, expert: int = 0) -> Tensor:
        """Returns what `torch.nn.functional.linear` returns for the unpacked weight.

        Raises:
            RuntimeError: a gradient is asked for.
        """
        if torch.compiler.is_compiling() or type(x) is not Tensor:  # such as one that has no values
            out = self.header.shape[-1 if self.header.swapped else -2]
            return packed_linear(x, self.packed, bias, out, expert)
        if (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
            raise RuntimeError(NO_TRAINING)
        rows = self._rows
        if rows is None or rows.address != self._buffers["packed"].data_ptr():  # type: ignore[union-attr]
            rows = self.rows
        return rows.multiply(x, bias, expert)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # copies make their own

    def stands_for(self, name: str) -> str:
        """Returns the name of the parameter that the module stands for; `name`: the module's own."""
        return f"{name}.weight"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.packed

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        key = prefix + "weight"
        found = state_dict.get(key)
        if found is None:
            arguments[2].append(key)  # missing keys
        else:
            try:
                header = codec.check(found)
                if (header.shape, header.swapped) != (self.header.shape, self.header.swapped):
                    raise ValueError(f"packed weight: {header.shape} where the layer has {self.header.shape}")
                self.packed, self.header = with_room(found.clone()), header
            except ValueError as error:
                arguments[4].append(f"{key}: {error}; a packed layer loads packed bytes only")
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, *arguments)


class PackedLinear(Packed):
    """A linear layer whose weight is packed; in place of `nn.Linear`, or of transformers' `Conv1D`.

    `transposed`: the model stores the weight as `[in, out]`, as `Conv1D` does. `weight` is the dense weight, unpacked
    anew each time it is looked at.
    """

    def __init__(
        self, packed: Tensor, bias: nn.Parameter | None, *, dtype: torch.dtype, transposed: bool = False
    ) -> None:
        super().__init__(packed, dtype)
        self.transposed = transposed
        first, second = self.header.shape
        self.in_features, self.out_features = (first, second) if transposed else (second, first)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, as the model has it; it takes the time of unpacking."""
        return self.dense()

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x @ W.T + bias` in x's dtype; x: `[..., in]`."""
        return self.product(x, self._parameters["bias"])

    def extra_repr(self) -> str:
        """Returns the shape and the size in memory."""
        share = 100 * self.packed.numel() / (self.in_features * self.out_features * self.header.dtype.itemsize)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"values={str(self.header.dtype).removeprefix('torch.')}, {share:.1f} % of dense"
        )
