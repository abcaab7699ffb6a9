"""How one layer becomes sparse; one file per paper."""

from ..algorithm import Pruner
from .magnitude import Magnitude
from .sparsegpt import SparseGPT
from .wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}
