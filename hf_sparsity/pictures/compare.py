"""Several plans of one model side by side, and what several allocators measured on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..plan import Plan
from .colours import AMOUNT
from .grid import Cell, Grid, make_grid
from .panels import Dots, Heat, Picture, Shown, bounds, brief, cells, clean, dots, framed, place_name, sparsities, tells


@dataclass(frozen=True)
class Amounts(Heat):
    """Colours of an allocator's own numbers; on a logarithmic scale the cells' values are powers of ten."""

    log: bool = False
    empty: ClassVar[str] = "no number"

    def tick(self, value: float) -> str:
        """Returns a place on the scale in the allocator's numbers."""
        return brief(10**value if self.log else value)


def side_by_side(plan: Plan, plans: Mapping[str, Mapping[str, float]]) -> Picture:
    """Returns a panel for each of `plans`, title -> {layer: sparsity}, on one scale of colours; `plan` has the layers' sizes."""
    grids = {title: make_grid(_with_sparsities(plan, layers)) for title, layers in plans.items()}
    low, high = bounds([cell.shown for grid in grids.values() for row in grid.cells.values() for cell in row.values()])
    first = next(iter(grids.values()))
    shown = [cell for grid in grids.values() for row in grid.cells.values() for cell in row.values()]
    notes = ["cells are means, weighted by size, of the layers that share them"] * any(c.layers > 1 for c in shown)
    return framed("plans", first, [sparsities(title, grid, low, high) for title, grid in grids.items()], notes)


def measured(plan: Plan, measures: Mapping[str, Mapping[str, float]]) -> Picture:
    """Returns a panel for each allocator whose numbers, {layer: number}, differ and can be drawn."""
    grids = {name: make_grid(_with_measures(plan, name, numbers)) for name, numbers in measures.items()}
    panels: list[Heat | Dots] = [_panel(clean(name), grid) for name, grid in grids.items() if tells(grid)]
    return framed("measures", make_grid(plan), panels)


def _with_sparsities(plan: Plan, sparsities: Mapping[str, float]) -> Plan:
    return replace(plan, layers={n: replace(x, sparsity=sparsities[n], measure=None) for n, x in plan.layers.items()})


def _with_measures(plan: Plan, name: str, numbers: Mapping[str, float]) -> Plan:
    layers = {n: replace(x, measure=numbers.get(n)) for n, x in plan.layers.items()}
    return replace(plan, config={**plan.config, "allocator": {"name": name.partition("(")[0]}}, layers=layers)


def _panel(name: str, grid: Grid) -> Heat | Dots:
    """Returns dots where all layers of a block have one number, else colours by projection too."""
    if all(low == high for low, _, high in grid.measures.values()):
        return replace(dots(grid, ""), title=f"{name}\n{clean(grid.measure_name)}", caption="")
    values = [cell.measure for row in grid.cells.values() for cell in row.values() if cell.measure is not None]
    low, high = min(values), max(values)
    log = low > 0 and high / low >= 100

    def show(block: str, projection: str, cell: Cell) -> Shown | None:
        if cell.measure is None:
            return None
        words = f"{place_name(block, projection)}: {clean(grid.measure_name)} {cell.measure:.4g}"
        experts = f", the mean of {cell.layers} layers" if cell.layers > 1 else ""
        return Shown(math.log10(cell.measure) if log else cell.measure, _short(cell.measure), "", words + experts)

    ends = (math.log10(low), math.log10(high)) if log else (low, high)
    return Amounts(f"{name}\n{clean(grid.measure_name)}", "", cells(grid, show), *_apart(*ends), AMOUNT, log)


def _apart(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    """Returns a number in about five letters, which fit into a cell."""
    size = abs(value)
    if size >= 99999.5 or 0 < size < 0.0005:
        return brief(value, 1)
    return f"{value:.0f}" if size >= 100 else brief(value) if size >= 1 else f"{value:.3f}"
