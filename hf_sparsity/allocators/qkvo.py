"""The q/k/v/o prior: where an evolutionary search put the sparsity of attention, as a rule of thumb.

Derived from the optima of EvoPress, Sieberling et al., ICML 2025, https://arxiv.org/abs/2410.14649, as released
in IST-DASLab/EvoPress, pruning_configs/. Not a method of that paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..algorithm import Allocator, Citation, ModelOracle
from ..validation import check_number

# Last part of a layer's name -> projection.
NAMES = {
    "q": ("q_proj", "q", "query", "q_lin", "wq", "to_q"),
    "k": ("k_proj", "k", "key", "k_lin", "wk", "to_k"),
    "v": ("v_proj", "v", "value", "v_lin", "wv", "to_v"),
    "qkv": ("qkv_proj", "qkv", "query_key_value", "c_attn", "wqkv", "in_proj", "att_proj"),
    "o": ("o_proj", "o", "out_proj", "out_lin", "wo", "to_out", "dense", "c_proj", "proj"),
}
PROJECTIONS = {ending: projection for projection, endings in NAMES.items() for ending in endings}


@dataclass(frozen=True)
class QKVO(Allocator):
    """Prunes queries and keys more, values and the output projection less; looks at names only.

    The defaults are the means, rounded, over all blocks of the 12 released configurations for Llama-2-7B, Llama-3-8B,
    Llama-3.1-8B and Mistral-7B at 50, 60 and 70 % (a level is a million weights): q +8.7, k +6.8, v -15.0, o -6.8
    points; gate, up and down projections stay within 1.1 on average. The k's differ: +4 to +14, but -3 to -8 for Llama-3.1, the
    only one whose search could trade between layers of different size. Between 30 and 70 % the offsets are
    added as they are, and towards 0 and 100 % they shrink with what there is to shift.

    A projection is known by its layer's name inside a module of attention. A fused one gets the mean of q, k and v;
    layers of other names share what is left over.
    """

    q: float = 0.09
    k: float = 0.07
    v: float = -0.15
    o: float = -0.07
    strength: float = 1.0  # factor of all four offsets

    name = "qkvo"
    paper = "https://arxiv.org/abs/2410.14649"
    summary = "a prior by projection, from the optima that EvoPress released; needs no data"
    citation = Citation(
        "sieberling2024evopress",
        "{EvoPress}: Towards Optimal Dynamic Model Compression via Evolutionary Search",
        "Oliver Sieberling and Denis Kuznedelev and Eldar Kurtic and Dan Alistarh",
        2024,
        "2410.14649",
    )
    needs = frozenset()
    race_grid = {"strength": (0.5, 1.0)}

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "o"):
            hint = ": a difference of sparsities, between -1 and 1 (0.09, not 9)"
            check_number(f"qkvo: {name}", getattr(self, name), "(-1, 1)", hint=hint)
        check_number("qkvo: strength", self.strength)

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """Returns `target` plus the projection's offset; all other layers make up for what this changes of the whole."""
        room = min(1.0, min(target, 1 - target) / 0.3)
        offsets = {"q": self.q, "k": self.k, "v": self.v, "o": self.o, "qkv": (self.q + self.k + self.v) / 3}
        names = [name for block in measures for name in block]
        projections = {name: projection(name) for name in names}
        shift = {name: room * self.strength * offsets.get(kind or "", 0.0) for name, kind in projections.items()}
        others = sum(sizes[name] for name in names if projections[name] is None)
        surplus = sum(shift[name] * sizes[name] for name in names)
        rest = -surplus / others if others else 0.0
        return {name: target + (rest if projections[name] is None else shift[name]) for name in names}


def projection(name: str) -> str | None:
    """Returns `"q"`, `"k"`, `"v"`, `"o"`, `"qkv"` or None for a layer's full name, such as `model.layers.0.self_attn.q_proj`."""
    *parents, last = name.lower().split(".")
    inside = [parent for parent in parents if "attn" in parent or "attention" in parent]
    if not inside or any("linear" in parent for parent in inside):  # linear attention was never searched
        return None
    return PROJECTIONS.get(last)
