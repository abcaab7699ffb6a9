"""MSP: mixed sparsity pruning.

Xu et al., https://arxiv.org/abs/2503.11164. The authors released no code: this is **reconstructed**
from the paper, and every choice it leaves open is a field.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from ..algorithm import FISHER, LOSS, Allocator, Citation, Layer, ModelOracle, Pruner
from ..core.allocation import floored, standard_logs
from ..validation import check_number

logger = logging.getLogger(__name__)

Genotype = tuple[int, ...]  # of each gene: the number of weights that its layers keep of each group


@dataclass(frozen=True)
class MSP(Allocator):
    """Evolves the number of weights kept of each group, starting from the Fisher information of each layer.

    With `*:M` a gene is the N of its layers' N:M, 1 to M; otherwise a sparsity in steps of 1 / `steps`. The first
    population follows the Fisher information: sensitive blocks keep more. The `parents` best survive; a child
    takes the head of one and the tail of another, mutates by single steps, and is repaired to the target.
    The fitness is `probe.loss`, computed once for each genotype.
    """

    per: str = "block"  # what a gene stands for: all layers of a "block", or one "layer"
    steps: int = 16
    population: int = 20
    generations: int = 30
    parents: int = 4
    patience: int = 8  # generations without gain before it stops
    mutation: float = 0.1  # probability that a gene moves one step
    kappas: tuple[float, ...] = (0.4, 0.8, 1.2)  # levels kept more per standard deviation of log Fisher
    noise: float = 0.35  # standard deviation, in levels, of the first population
    evaluations: int | None = None  # largest number of calls of the loss; None: no limit

    name = "msp"
    paper = "https://arxiv.org/abs/2503.11164"
    summary = "evolutionary search seeded with Fisher information (reconstructed: no code was released)"
    citation = Citation(
        "xu2025towards",
        "Towards Extreme Pruning of {LLMs} with Plug-and-Play Mixed Sparsity",
        "Chi Xu and Gefei Zhang and Yantong Zhu and Luca Benini and Guosheng Hu and Yawei Li and Zhihong Zhang",
        2025,
        "2503.11164",
    )
    needs = frozenset({FISHER, LOSS})
    returns_group_multiples = True
    measure_label = "Fisher information"
    enters_races = False  # hundreds of evaluations: only when it is named
    demo_options = {"population": 8, "generations": 3, "parents": 2}

    def __post_init__(self) -> None:
        object.__setattr__(self, "kappas", tuple(self.kappas))
        if self.per not in ("block", "layer"):
            raise ValueError(f"msp: per={self.per!r} is unknown; use 'block' or 'layer'")
        for name in ("population", "parents"):
            check_number(f"msp: {name}", getattr(self, name), "[1, inf)", whole=True)
        if self.parents > self.population:
            raise ValueError(f"msp: needs 1 <= parents <= population, not {self.parents} of {self.population}")
        check_number("msp: steps", self.steps, "[2, 255]", whole=True)
        check_number("msp: mutation", self.mutation, "[0, 1]")
        if self.evaluations is not None:
            check_number("msp: evaluations", self.evaluations, "[1, inf)", whole=True, hint=", or None for no limit")

    @property
    def grid_steps(self) -> int:
        """`steps`: losses are asked for on this grid of sparsities."""
        return self.steps

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """Returns each layer's Fisher trace: the mean over sequences of the squared norm of the loss' gradient."""
        return {name: layer.trace(self.name) for name, layer in block.items()}

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """Returns the sparsities of the best genotype.

        It never keeps more weights than the target allows, and falls short by less than the smallest gene. A target that
        leaves less than one weight of each group gives that one, or, without `group`, the target everywhere.
        """
        if probe is None or probe.loss is None:
            raise ValueError("msp compares candidates by the model's loss (`probe.loss`); plan with calibration data")
        ask, levels = probe.losses, group or self.steps
        genes = [list(block) for block in measures if block]
        if self.per == "layer":
            genes = [[name] for names in genes for name in names]
        fisher = {name: value for block in measures for name, value in block.items()}
        space = Genes(
            sizes=[sum(sizes[name] for name in names) for names in genes],
            fisher=[math.fsum(float(fisher[name]) for name in names) for names in genes],
            levels=levels,
            target=target,
            random=Random(probe.seed),
        )

        def sparsities(genotype: Genotype) -> dict[str, float]:
            return {name: 1 - n / levels for names, n in zip(genes, genotype, strict=True) for name in names}

        if space.budget < sum(space.sizes) and group is None:
            return {name: target for names in genes for name in names}
        if space.budget <= sum(space.sizes) or target == 0:
            return sparsities(space.uniform())
        best, history = evolve(self, space, lambda genotypes: ask([sparsities(genotype) for genotype in genotypes]))
        logger.info("msp: loss %.4f -> %.4f in %d generations", history[0], history[-1], len(history) - 1)
        return sparsities(best)


def evolve(
    method: MSP, space: Genes, losses: Callable[[Sequence[Genotype]], Sequence[float]]
) -> tuple[Genotype, list[float]]:
    """The best genotype found and the best loss of each generation, the first population's first."""
    fitness: dict[Genotype, float] = {}

    def ranked(population: Sequence[Genotype]) -> list[Genotype]:
        """Best first, without those that the number of evaluations no longer allows."""
        new = list(dict.fromkeys(genotype for genotype in population if genotype not in fitness))
        if method.evaluations is not None:
            new = new[: method.evaluations - len(fitness)]
        for genotype, value in zip(new, losses(new), strict=True):
            fitness[genotype] = math.inf if math.isnan(value) else float(value)
        return sorted((g for g in population if g in fitness), key=lambda g: (fitness[g], g))

    population = ranked(space.first(method.population, method.kappas, method.noise))
    history, stale = [fitness[population[0]]], 0
    for generation in range(method.generations):
        if stale >= method.patience or len(fitness) == method.evaluations:
            break
        make = partial(space.child, population[: method.parents], method.mutation)
        population = ranked(space.distinct(method.population, make, population[: method.parents]))
        history.append(fitness[population[0]])
        stale = 0 if history[-1] < history[-2] else stale + 1
        logger.info("msp: generation %d, %d evaluations, loss %.4f", generation + 1, len(fitness), history[-1])
    return population[0], history


class Genes:
    """The genotypes within a budget, and the ways to make them.

    `sizes`: weights of each gene's layers. `fisher`: their trace. A gene is 1 to `levels`; the sum of
    size times gene never exceeds `budget`, and no gene can be raised without exceeding it.
    """

    def __init__(self, *, sizes: Sequence[int], fisher: Sequence[float], levels: int, target: float, random: Random):
        self.sizes, self.levels, self.random = sizes, levels, random
        self.mean = (1 - target) * levels
        self.budget = math.floor(self.mean * sum(sizes) + 1e-6)
        self.fisher = floored(fisher)
        self.z = standard_logs(self.fisher)

    def uniform(self) -> Genotype:
        """Returns equal genes; where the budget lies between two levels, the higher one is dealt out evenly in depth."""
        genotype, owed = [], 0.0
        for size in self.sizes:
            owed += self.mean * size
            genotype.append(min(max(math.floor(owed / size + 1e-9), 1), self.levels))
            owed -= genotype[-1] * size
        return self.repair(genotype)

    def seeded(self, kappa: float, noise: float) -> Genotype:
        """`round(mean + kappa * z + noise)`, repaired: sensitive genes keep more."""
        return self.repair([round(self.mean + kappa * z + noise * self.random.gauss(0, 1)) for z in self.z])

    def first(self, count: int, kappas: Sequence[float], noise: float) -> list[Genotype]:
        """The first population: uniform, the noiseless `kappas`, and noisy ones between 0 and their maximum."""
        fixed = list(dict.fromkeys([self.uniform(), *(self.seeded(kappa, 0.0) for kappa in kappas)]))
        most = max(kappas, default=0.0)
        return self.distinct(count, lambda: self.seeded(self.random.uniform(0, most), noise), fixed)

    def child(self, parents: Sequence[Genotype], mutation: float) -> Genotype:
        """Returns a child: the head of one parent, the tail of another, mutated by single steps, and repaired."""
        head, tail = self.random.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
        cut = self.random.randint(1, max(len(head) - 1, 1))
        joined = head[:cut] + tail[cut:]
        return self.repair([n + self.random.choice((-1, 1)) if self.random.random() < mutation else n for n in joined])

    def distinct(self, count: int, make: Callable[[], Genotype], first: Sequence[Genotype]) -> list[Genotype]:
        """Returns `first` and what `make` adds up to `count`, without duplicates; fewer where the space is small."""
        genotypes = dict.fromkeys(first)
        for _ in range(10 * count):
            if len(genotypes) >= count:
                break
            genotypes[make()] = None
        return list(genotypes)

    def repair(self, genotype: Sequence[int]) -> Genotype:
        """Clips to 1 .. levels and meets the budget: lowers genes drawn by 1 / Fisher, raises genes drawn by Fisher.

        A genotype that already does is returned as it is.
        """
        genes = [min(max(n, 1), self.levels) for n in genotype]
        room = self.budget - sum(n * size for n, size in zip(genes, self.sizes, strict=True))
        while room < 0 and (able := [i for i, n in enumerate(genes) if n > 1]):
            i = self.random.choices(able, [1 / self.fisher[i] for i in able])[0]
            genes[i] -= 1
            room += self.sizes[i]
        while able := [i for i, n in enumerate(genes) if n < self.levels and self.sizes[i] <= room]:
            i = self.random.choices(able, [self.fisher[i] for i in able])[0]
            genes[i] += 1
            room -= self.sizes[i]
        return tuple(genes)
