"""Parameters that torch has split among processes (FSDP2's `DTensor`)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """True if this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that is on this process, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
