"""Moves what an allocator assigned until the sparsity target is met exactly."""

from __future__ import annotations

from collections.abc import Mapping

from ..algorithm import Pattern
from ..core import budget


def meet(
    assigned: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    pattern: Pattern,
    *,
    group_multiples: bool = False,
) -> dict[str, float]:
    """Returns `assigned`, clamped and moved until the global sparsity is `target` exactly.

    `group_multiples`: with a pattern `*:M` the sparsities are multiples of 1/M already.
    """
    if not pattern.is_mixed:
        return budget.meet(assigned, sizes, target)
    assert pattern.group is not None
    ideal = assigned if group_multiples else budget.meet(assigned, sizes, target, high=1 - 1 / pattern.group)
    return budget.meet_groups(ideal, sizes, target, pattern.group)
