"""A plan, and what became of it, by block and projection: numbers only, nothing is drawn here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..allocators import ALLOCATORS
from ..demo import NAME, is_embedded
from ..plan import LayerPlan, Plan, Report

LARGEST = (1000, 100)  # blocks and projections of a picture
_BLOCK = re.compile(r"^(.*?\.\d+)\.(.+)$", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One projection of one block: the mean, weighted by size, of the `layers` that share it (experts, usually).

    `low` and `high` are the smallest and largest sparsity among them; `reached` is None where nothing was counted.
    """

    planned: float
    reached: float | None
    low: float
    high: float
    layers: int
    measure: float | None

    @property
    def shown(self) -> float:
        """The sparsity reached, or planned where nothing was counted."""
        return self.planned if self.reached is None else self.reached


@dataclass(frozen=True)
class Grid:
    """Blocks down, projections across, both in model order; a block need not have every projection.

    `measures`: block -> (smallest, mean, largest) of what the allocator found there. `furthest`: the layer whose
    reached sparsity is furthest from its plan.
    """

    name: str
    plan: Plan
    report: Report | None
    projections: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    measures: Mapping[str, tuple[float, float, float]]
    furthest: str | None

    @property
    def allocator(self) -> str:
        """Its name, or "" if the config has none."""
        allocator = self.plan.config.get("allocator") or ""
        return str(allocator.get("name", "") if isinstance(allocator, Mapping) else allocator)

    @property
    def measure_name(self) -> str:
        """What the numbers in `measures` are."""
        return measure_label(self.allocator)


def measure_label(allocator: str) -> str:
    """Returns what an allocator's numbers are, in words; "" stands for an unknown allocator."""
    ours = ALLOCATORS.get(allocator)
    return (ours.measure_label if ours else "") or (f"measure of {allocator}" if allocator else "measure")


def make_grid(plan: Plan, report: Report | None = None, name: str | None = None) -> Grid:
    """Returns a plan, and its report if pruning has happened, by block and projection; `name` defaults to the model's.

    Raises ValueError when the report lacks a layer of the plan, or there are too many blocks or projections to look at.
    """
    check_report(plan, report)
    # A config.json sorts its names; a report has them in the order of the model.
    where = places(name for name in (plan if report is None else report).layers if name in plan.layers)
    sharing: dict[tuple[str, str], list[str]] = {}
    for layer, place in where.items():
        sharing.setdefault(place, []).append(layer)
    cells: dict[str, dict[str, Cell]] = {}
    for (block, projection), names in sharing.items():
        cells.setdefault(block, {})[projection] = _cell({n: plan.layers[n] for n in names}, report)
    cells = {block: cells[block] for block in _by_depth(cells)}
    size = len(cells), len({projection for _, projection in sharing})
    if size[0] > LARGEST[0] or size[1] > LARGEST[1]:
        raise ValueError(
            f"the plan has {size[0]} blocks and {size[1]} projections; a picture shows at most {LARGEST[0]} and {LARGEST[1]}"
        )
    furthest = max(plan.layers, key=lambda n: _distance(report.layers[n].sparsity, plan.layers[n])) if report else None
    return Grid(
        name or model_name(plan),
        plan,
        report,
        tuple(_in_order(cells.values())),
        cells,
        _measures(plan, where),
        furthest,
    )


def check_report(plan: Plan, report: Report | None) -> None:
    """Raises ValueError when the report is not about the layers of the plan."""
    missing = [name for name in plan.layers if report is not None and name not in report.layers]
    if missing:
        raise ValueError(
            f"{len(missing)} layers of the plan are not in the model or report, {missing[0]} the first: they do not belong together"
        )


def check_alike(first: Plan, second: Plan) -> None:
    """Raises ValueError unless both plans are about the same layers of the same sizes."""
    sizes = [{name: layer.size for name, layer in plan.layers.items()} for plan in (first, second)]
    if sizes[0] == sizes[1]:
        return
    different = [name for name in {**sizes[0], **sizes[1]} if sizes[0].get(name) != sizes[1].get(name)]
    raise ValueError(
        f"these are different models: {len(different)} layers are in one only or differ in size, {different[0]} the first "
        f"({' and '.join(_weights(size.get(different[0])) for size in sizes)}); compare two sparse versions of one model"
    )


def model_name(plan: Plan) -> str:
    """Returns the model's name as the plan has it; of a local path only the last part, and of the embedded model `demo`."""
    name = str(plan.model.get("name") or plan.model.get("type") or "model")
    if is_embedded(name):
        return NAME
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if re.match(r"[/\\.~]|[A-Za-z]:", name) else name


def split_name(name: str) -> tuple[str, str]:
    """Returns the block of a layer, and the path inside it without the numbers of experts.

    `model.layers.3.mlp.experts.up_proj[7]` gives (`model.layers.3`, `mlp.experts.up_proj`); the block is "" for a name
    outside all blocks.
    """
    match = _BLOCK.match(name)
    block, rest = (match[1], match[2]) if match else ("", name)
    *parents, last = re.sub(r"\[\d+\]$", "", rest).split(".")
    if last.isdigit() and parents:  # of nn.Sequential: a name of its own, not an expert
        last = f"{parents.pop()}.{last}"
    return block, ".".join([*(part for part in parents if not part.isdigit()), last])


def places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns {layer: (block, projection)}; a projection is called by the shortest end of its path that only it has.

    That is `q_proj` in most models, in GPT-2 `attn.c_proj` and `mlp.c_proj`; all experts of a block share one.
    """
    split = {name: split_name(name) for name in names}
    ends = {path: [".".join(path.split(".")[-k:]) for k in (1, 2, 3)] for path in {path for _, path in split.values()}}
    count = Counter(end for path in ends for end in set(ends[path]))
    short = {path: next((end for end in ends[path] if count[end] == 1), path) for path in ends}
    return {name: (block, short[path]) for name, (block, path) in split.items()}


def by_block_and_projection(sparsities: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Returns {block: {projection: sparsity}} by depth, means weighted by size where several layers share a projection."""
    sums: dict[str, dict[str, tuple[float, int]]] = {}
    for name, (block, projection) in places(sparsities).items():
        total, size = sums.setdefault(block, {}).get(projection, (0.0, 0))
        sums[block][projection] = (total + sparsities[name] * sizes[name], size + sizes[name])
    return {block: {p: total / size for p, (total, size) in sums[block].items()} for block in _by_depth(sums)}


def _cell(layers: Mapping[str, LayerPlan], report: Report | None) -> Cell:
    size = sum(layer.size for layer in layers.values())
    planned = math.fsum(layer.sparsity * layer.size for layer in layers.values()) / size
    measures = [layer.measure for layer in layers.values() if layer.measure is not None]
    shown = [layer.sparsity for layer in layers.values()]
    reached = None
    if report is not None:
        shown = [report.layers[name].sparsity for name in layers]
        reached = math.fsum(s * layer.size for s, layer in zip(shown, layers.values(), strict=True)) / size
    measure = _mean(measures) if measures else None
    return Cell(planned, reached, min(shown), max(shown), len(layers), measure)


def _measures(plan: Plan, where: Mapping[str, tuple[str, str]]) -> dict[str, tuple[float, float, float]]:
    by_block: dict[str, list[float]] = {}
    for name, layer in plan.layers.items():
        if layer.measure is not None:
            by_block.setdefault(where[name][0], []).append(layer.measure)
    return {block: (min(values), _mean(values), max(values)) for block, values in by_block.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # numbers from a file may be too large to add up


def _by_depth(blocks: Iterable[str]) -> list[str]:
    """Returns blocks in order, 10 after 9 whatever the order of the names; an encoder and a decoder stay apart."""
    stacks: dict[str, list[str]] = {}
    for block in blocks:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    return [block for stack in stacks.values() for block in sorted(stack, key=lambda name: (len(name), name))]


def _in_order(rows: Iterable[Mapping[str, Cell]]) -> list[str]:
    """Returns the names of all projections, each where its own blocks have it: attention kinds that take turns stand side by side."""
    order: list[str] = []
    for row in rows:
        position = 0
        for projection in row:
            if projection in order:
                position = order.index(projection) + 1
            else:
                order.insert(position, projection)
                position += 1
    return order


def _distance(reached: float, layer: LayerPlan) -> float:
    return abs(reached - layer.sparsity)


def _weights(size: int | None) -> str:
    return "not there" if size is None else f"{size} weights"
