"""How one layer becomes sparse; one file per paper."""

from ..algorithm import Pruner
from .admm import ADMM
from .alps import ALPS
from .magnitude import Magnitude
from .ria import RIA
from .sparsegpt import SparseGPT
from .wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "admm": ADMM,
    "alps": ALPS,
}
