"""Small searches: their text, config and grid, and a loss whose optimum is known."""

from __future__ import annotations

import torch

from hf_sparsity import SparsityConfig
from hf_sparsity.core.budget_grid import Grid
from hf_sparsity.core.nested_masks import rank_rows
from hf_sparsity.distributed import Processes
from hf_sparsity.evaluation.divergence import PlanScores
from hf_sparsity.planning.race.evaluator import Evaluator, SearchBudget


def texts(count: int = 16, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 120, (count, tokens), generator=torch.Generator().manual_seed(3))


def config(budget: str = "50 evals", seed: int = 0, **options) -> SparsityConfig:
    search = {"name": "search", "budget": budget, "candidates": ("owl",), "slices": (48, 96), "offspring": 4}
    search |= {"descent": 0} | options
    return SparsityConfig(0.6, allocator=search, seed=seed)


def grid(target: float = 0.6) -> Grid:
    shapes = {f"layers.{i}.{p}": (o, 48) for i in range(4) for p, o in (("q", 48), ("k", 16), ("up", 96))}
    ranks = {name: rank_rows(torch.rand(shape)) for name, shape in shapes.items()}
    sizes = {name: ranks[name].size for name in shapes}
    return Grid({n: r.zeros for n, r in ranks.items()}, sizes, {n: r.cells for n, r in ranks.items()}, target)


ENDS = [1, 3, 5]  # pieces of each slice


class Quadratic(Evaluator):
    """The best plan is known: each block, sparser with depth."""

    def __init__(self, one: Grid, limit: float):
        super().__init__([], one, {}, SearchBudget({"evals": limit}, Processes()), ENDS)
        ideal = {n: 0.45 + 0.1 * int(n.split(".")[1]) for n in one.names}
        self.ideal = one.fractions(one.nearest(ideal))
        self.asked: list[tuple[int, list[int]]] = []

    def scores_on(self, points, pieces):
        self.asked.append((len(points), list(pieces)))
        self.budget.spent["evals"] += len(points)
        found = []
        for point in points:
            now = self.grid.fractions(point)
            value = sum((now[n] - self.ideal[n]) ** 2 * self.grid.sizes[n] for n in now) / sum(self.grid.sizes.values())
            found.append(PlanScores(*(torch.full((3,), x, dtype=torch.float64) for x in (value, value, 9.0))))
        return found
