"""Meet a sparsity target exactly with what an allocator assigned."""

from __future__ import annotations

from collections.abc import Mapping

from ..algorithm import Pattern
from ..core import budget


def meet(
    assigned: Mapping[str, float], sizes: Mapping[str, int], target: float, pattern: Pattern, *, mixes: bool = False
) -> dict[str, float]:
    """Clamped and moved until the global sparsity is the target exactly; `mixes`: multiples of 1/M already, for `*:M`."""
    if not pattern.is_mixed:
        return budget.meet(assigned, sizes, target)
    assert pattern.group is not None
    ideal = assigned if mixes else budget.meet(assigned, sizes, target, high=1 - 1 / pattern.group)
    return budget.meet_groups(ideal, sizes, target, pattern.group)
