"""How sparse each layer, or each row of a layer, should be; one file per paper.

The two tables are read by the configuration, the command line, the README and the contract tests.
"""

from ..algorithm import Allocator, RowAllocator
from .alpha import AlphaPruning
from .atp import ATP
from .dlp import DLP
from .farms import FARMS
from .fisher import Fisher
from .lsa import LSA
from .mrp import MRP
from .msp import MSP
from .owl import OWL
from .qkvo import QKVO
from .trim import TRIM
from .uniform import Uniform

ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "owl": OWL,
    "alphapruning": AlphaPruning,
    "farms": FARMS,
    "mrp": MRP,
    "msp": MSP,
    "dlp": DLP,
    "atp": ATP,
    "lsa": LSA,
    "qkvo": QKVO,
    "fisher": Fisher,
}

ROW_ALLOCATORS: dict[str, type[RowAllocator]] = {"trim": TRIM}
