"""What a picture shows: panels side by side that share their blocks, as numbers and in words; nothing is drawn here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

from .colours import DIFFERENCE, SPARSITY
from .grid import Cell, Grid, check_alike

NUMBERED = 40  # blocks: with more, cells have colours but no numbers
WIDE = 0.05  # sparsity: the range among the layers of a cell is shown if it is at least this wide
SEEN = 0.005  # sparsity: a smaller difference of reached from planned is said, not drawn
LABEL = 32  # letters of a name


class Shown(NamedTuple):
    """What a cell shows: a value as its colour, `text` and below it `small` in the cell, and all of it in words."""

    value: float
    text: str
    small: str
    words: str


class BlockRange(NamedTuple):
    """The smallest, mean and largest measure among the layers of a block, and the same in words."""

    low: float
    mean: float
    high: float
    words: str


@dataclass(frozen=True)
class Heat:
    """Colours by block and projection. `cells[row][column]` is None where the block has no such layer."""

    title: str
    caption: str
    cells: list[list[Shown | None]]
    low: float
    high: float
    scale: Sequence[str]
    empty: ClassVar[str] = "no such layer"

    def tick(self, value: float) -> str:
        """A place on the scale of colours, in words."""
        if self.scale is DIFFERENCE:
            return "0" if abs(value) < 1e-9 else f"{100 * value:+.3g}"
        return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class Dots:
    """One number a block; `rows[row]` is None where the allocator measured nothing."""

    title: str
    caption: str
    rows: list[BlockRange | None]
    low: float
    high: float
    log: bool

    @property
    def ticks(self) -> list[float]:
        """Up to five round numbers between the edges; powers of ten on a logarithmic scale."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**power for power in powers[:: -(-len(powers) // 5) or 1]]
        return round_ticks(self.low, self.high)


@dataclass(frozen=True)
class Picture:
    """Panels over the same `blocks`.

    Args:
        title: of the whole picture.
        notes: sentences to stand below it.
        blocks: how many, from top to bottom.
        ticks: (row, label) of those blocks that are named.
        breaks: rows before which another stack of blocks, such as a decoder, begins.
        projections: names of the columns of a `Heat`.
        panels: from left to right.
    """

    title: str
    notes: list[str]
    blocks: int
    ticks: list[tuple[int, str]]
    breaks: list[int]
    projections: list[str]
    panels: list[Heat | Dots]

    @property
    def numbered(self) -> bool:
        """True if there is room for numbers in the cells."""
        return self.blocks <= NUMBERED


def make_picture(*grids: Grid) -> Picture:
    """Returns the picture of one model, or of two versions of one and their difference.

    Raises ValueError for two different models.
    """
    first, two = grids[0], len(grids) > 1
    if two:
        check_alike(*(grid.plan for grid in grids))
    names = _distinct([clean(grid.name, 22 if two else LABEL) for grid in grids])
    panels: list[Heat | Dots] = [*_sparsities(grids, names if two else None), *_misses(grids, names if two else None)]
    panels += [dots(grid, name if two else "") for grid, name in zip(grids, names, strict=True) if tells(grid)]
    notes = [note for grid, name in zip(grids, names, strict=True) for note in _notes(grid, name if two else "")]
    return framed(" and ".join(names), first, panels, notes)


def framed(title: str, grid: Grid, panels: list[Heat | Dots], notes: Sequence[str] = ()) -> Picture:
    """Returns a picture of panels over the blocks and projections of a grid."""
    ticks, breaks = _ticks(list(grid.cells))
    projections = [clean(projection) for projection in grid.projections]
    return Picture(title, list(notes), len(grid.cells), ticks, breaks, projections, panels)


def round_ticks(low: float, high: float) -> list[float]:
    """Returns up to about five round numbers between two that differ."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def brief(value: float, digits: int = 3) -> str:
    """Returns a number in a few letters."""
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.{digits}g}")


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of a scale of sparsities: whole percents, at least 0.1 apart, so that noise has no strong colours."""
    low, high = min(values), max(values)
    widen = max(0.0, 0.1 - (high - low)) / 2
    low, high = math.floor(100 * (low - widen) + 1e-6) / 100, math.ceil(100 * (high + widen) - 1e-6) / 100
    return max(0.0, low), min(1.0, high)


def sparsities(title: str, grid: Grid, low: float, high: float) -> Heat:
    """Returns a panel of the sparsity reached, or planned where nothing was counted, coloured from `low` to `high`."""

    def show(block: str, projection: str, cell: Cell) -> Shown:
        small = f"{100 * cell.low:.0f}–{100 * cell.high:.0f}" if cell.high - cell.low >= WIDE else ""
        words = f"{place_name(block, projection)}: {describe(cell)}"
        return Shown(cell.shown, f"{100 * cell.shown:.0f}", small, words)

    return Heat(title, "weights removed", cells(grid, show), low, high, SPARSITY)


def describe(cell: Cell) -> str:
    """Returns all there is to say about a cell."""
    parts = [] if cell.reached is None else [f"reached {100 * cell.reached:.2f} %"]
    parts.append(f"planned {100 * cell.planned:.2f} %")
    if cell.measure is not None:
        parts.append(f"measure {cell.measure:.4g}")
    if cell.layers > 1:
        parts.append(f"{cell.layers} layers from {100 * cell.low:.2f} to {100 * cell.high:.2f} %")
    return ", ".join(parts)


def clean(name: str, letters: int = LABEL) -> str:
    """Returns a name without control characters, and without its middle where it is longer than `letters`."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[-(letters // 2) + 1 :]}"


def _sparsities(grids: Sequence[Grid], names: list[str] | None) -> list[Heat]:
    low, high = bounds([cell.shown for grid in grids for row in grid.cells.values() for cell in row.values()])
    heats = []
    for index, grid in enumerate(grids):
        state = "reached" if grid.report else "planned"
        heats.append(sparsities(f"{names[index]}\n{state}" if names else f"sparsity {state}", grid, low, high))
    if names:
        first, second = grids

        def change(block: str, projection: str, cell: Cell) -> tuple[float, str]:
            after = second.cells[block][projection]
            return after.shown - cell.shown, f"from {100 * cell.shown:.2f} to {100 * after.shown:.2f} %"

        heats.append(_difference("second minus first", first, change, least=0.02))
    return heats


def _misses(grids: Sequence[Grid], names: list[str] | None) -> list[Heat]:
    """Returns a panel of reached minus planned for each grid where the two differ visibly."""

    def missed(block: str, projection: str, cell: Cell) -> tuple[float, str]:
        return cell.shown - cell.planned, describe(cell)

    return [
        _difference(
            f"{names[index]}\nreached minus planned" if names else "reached minus planned", grid, missed, least=0.01
        )
        for index, grid in enumerate(grids)
        if any(abs(cell.shown - cell.planned) >= SEEN for row in grid.cells.values() for cell in row.values())
    ]


def _difference(title: str, grid: Grid, change: Callable[[str, str, Cell], tuple[float, str]], *, least: float) -> Heat:
    """Returns a panel of differences in percentage points; zero is the middle of its scale, which is at least 2 * `least` wide."""

    def show(block: str, projection: str, cell: Cell) -> Shown:
        by, reason = change(block, projection, cell)
        text = "0" if abs(by) < 0.0005 else f"{100 * by:+.1f}" if abs(by) < 0.0995 else f"{100 * by:+.0f}"
        return Shown(by, text, "", f"{place_name(block, projection)}: {100 * by:+.2f} points, {reason}")

    shown = cells(grid, show)
    reach = math.ceil(100 * max(least, *(abs(cell.value) for row in shown for cell in row if cell)) - 1e-6) / 100
    return Heat(title, "percentage points", shown, -reach, reach, DIFFERENCE)


def cells(grid: Grid, show: Callable[[str, str, Cell], Shown | None]) -> list[list[Shown | None]]:
    """Returns `show` of each cell in rows of blocks; None where a block has no such layer."""
    return [
        [show(block, p, row[p]) if p in row else None for p in grid.projections] for block, row in grid.cells.items()
    ]


def tells(grid: Grid) -> bool:
    """Returns whether the measures differ, and can be drawn; an allocator that looks at nothing has zeros, or none."""
    values = [value for row in grid.measures.values() for value in row]
    return bool(values) and max(map(abs, values)) < 1e300 and not math.isclose(min(values), max(values))


def dots(grid: Grid, name: str) -> Dots:
    """Returns a panel of what the allocator measured in each block."""
    values = [value for row in grid.measures.values() for value in row]
    low, high = min(values), max(values)
    log = low > 1e-300 and high / low >= 100
    edge = 0.05 * (high - low) or 1.0
    low, high = (low / 1.3, high * 1.3) if log else (low - edge, high + edge)
    rows: list[BlockRange | None] = []
    for block in grid.cells:
        measured = grid.measures.get(block)
        if measured is None:
            rows.append(None)
            continue
        smallest, mean, largest = measured
        span = f", layers from {smallest:.4g} to {largest:.4g}" if smallest < largest else ""
        words = f"{clean(block)}: {clean(grid.measure_name)} {mean:.4g}{span}"
        rows.append(BlockRange(smallest, mean, largest, words))
    return Dots(f"{name}\nmeasure" if name else "measure", clean(grid.measure_name), rows, low, high, log)


def _notes(grid: Grid, name: str) -> list[str]:
    """Returns sentences: totals, what differs from the plan, the widest range among experts, and what hatching means."""
    plan, report = grid.plan, grid.report
    algorithms = [
        clean(str(algorithm.get("name", algorithm)))
        for key in ("allocator", "row_allocator", "pruner")
        if isinstance(algorithm := plan.config.get(key), dict)
    ]
    first = f"target {100 * plan.target:.4g} %, planned {100 * plan.sparsity:.2f} %"
    if report is not None:
        first += f", reached {100 * _reached(grid):.2f} %"
    first += f" of the weights of {len(plan.layers)} layers; pattern {plan.config.get('pattern', 'unstructured')}"
    notes = [first + (f"; {' + '.join(algorithms)}" if algorithms else "")]
    if report is not None and grid.furthest is not None:
        reached, planned = report.layers[grid.furthest].sparsity, plan.layers[grid.furthest].sparsity
        if (off := abs(reached - planned)) < SEEN:
            notes.append(
                f"every layer is {'as planned' if off < 5e-5 else f'within {100 * off:.2f} points of its plan'}"
            )
        else:
            notes.append(
                f"furthest from its plan: {clean(grid.furthest)}, {100 * reached:.1f} % where {100 * planned:.1f} % was planned"
            )
    spread, at, cell = max(
        ((c.high - c.low, place_name(b, p), c) for b, row in grid.cells.items() for p, c in row.items()),
        key=lambda x: x[0],
    )
    if spread >= WIDE:
        notes.append(
            f"layers that share a cell are shown as their mean; widest: {at}, {100 * cell.low:.0f} to {100 * cell.high:.0f} %"
        )
    if any(len(row) < len(grid.projections) for row in grid.cells.values()):
        notes.append("hatched: the block has no such layer")
    return [f"{name}: {note}" if name else note for note in notes]


def _reached(grid: Grid) -> float:
    """Returns the sparsity reached over the layers of the plan; a report may have more layers."""
    assert grid.report is not None
    layers = [grid.report.layers[name] for name in grid.plan.layers]
    return sum(layer.zeros for layer in layers) / sum(layer.size for layer in layers)


def place_name(block: str, projection: str) -> str:
    """Returns the name of a cell for people."""
    return f"{clean(block)} {clean(projection)}".strip()


def _distinct(names: list[str]) -> list[str]:
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _ticks(blocks: list[str]) -> tuple[list[tuple[int, str]], list[int]]:
    """Returns (row, label) of at most about twenty blocks, and the rows where further stacks (a decoder, say) begin."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(blocks) <= (NUMBERED if step == 1 else 20 * step))
    ticks: list[tuple[int, str]] = []
    breaks: list[int] = []
    runs = [(stack, list(run)) for stack, run in groupby(range(len(blocks)), lambda row: _stack(blocks[row]))]
    short = _short([stack for stack, _ in runs])
    for stack, rows in runs:
        breaks += rows[:1] if rows[0] else []
        for row in rows:
            index = blocks[row].rpartition(".")[2] or "other"
            if row == rows[0]:
                ticks.append((row, clean(f"{short[stack]} {index}".strip())))
            elif (row - rows[0]) % step == 0 or (row == rows[-1] and row - ticks[-1][0] > step / 2):
                ticks.append((row, clean(index)))
    return ticks, breaks


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


def _short(stacks: list[str]) -> dict[str, str]:
    """Returns the part of each name that only it has: `encoder` of `model.encoder.layers` beside `model.decoder.layers`."""
    parts = {stack: stack.split(".") for stack in stacks}
    for end in (0, -1):
        while min(map(len, parts.values())) > (len(parts) > 1) and len({part[end] for part in parts.values()}) == 1:
            for part in parts.values():
                del part[end]
    return {stack: ".".join(part) for stack, part in parts.items()}
