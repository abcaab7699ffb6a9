"""Uniform: every layer has the target sparsity. The baseline of every paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..algorithm import Allocator, ModelOracle


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every layer gets the target; nothing is looked at."""

    name = "uniform"
    summary = "every layer the same"

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """`target` for every layer of `measures`."""
        return {name: target for block in measures for name in block}
