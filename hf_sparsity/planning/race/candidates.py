"""Who enters a race: every allocator with a small grid of its hyperparameters, and mixtures of the better ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...algorithm import LOSS, REMEASURE, Allocator, ModelOracle, Pattern
from ...allocators import ALLOCATORS
from ..budget import meet

# What is tried of each allocator; those that are not named enter as they are.
GRID: dict[str, dict[str, Sequence[Any]]] = {
    "owl": {"outlier": (5.0, 7.0), "spread": (0.05, 0.08, 0.15)},
    "alphapruning": {"spread": (0.1, 0.3), "per": ("block", "layer")},
    "farms": {"spread": (0.1, 0.3), "per": ("block", "layer")},
    "mrp": {"refresh": ("F0",)},  # a refresh is a pass over the model for each step of its loop
    "dlp": {"statistic": ("mean", "median"), "spread": (0.05, 0.15)},
    "lsa": {"spread": (0.05, 0.15)},
    "qkvo": {"strength": (0.5, 1.0)},
    "fisher": {"spread": (0.05, 0.1), "per": ("block", "layer")},
}
SEARCHERS = ("msp",)  # hundreds of evaluations each: only when named
# Hyperparameters that `measure` never looks at: those who differ in nothing else share their measures.
ONLY_IN_ASSIGN = {
    "owl": ("spread", "group_spread"),
    "alphapruning": ("spread", "per"),
    "farms": ("spread", "per"),
    "dlp": ("spread",),
    "lsa": ("spread", "per"),
    "fisher": ("spread", "per"),
}
MIXED = 4  # the better ones, each two of which are mixed in equal parts

KINDS = ("uniform", "single", "mixture", "descent", "search")  # the simplest first


@dataclass(frozen=True)
class Candidate:
    """A plan in the making: `sparsities` meet the target. `origin` says how it was made, in JSON types."""

    name: str
    kind: str
    sparsities: Mapping[str, float]
    origin: Mapping[str, Any]


def allocators(names: Sequence[str]) -> dict[str, Allocator]:
    """Instances by a name that tells them apart; uniform first. No names: all of the table but the searchers."""
    chosen = names or [name for name in ALLOCATORS if name not in SEARCHERS]
    found: dict[str, Allocator] = {}
    for name in dict.fromkeys(["uniform", *chosen]):
        grid = GRID.get(name, {})
        for values in itertools.product(*grid.values()):
            said = ", ".join(f"{key}={value}" for key, value in zip(grid, values, strict=True))
            found[f"{name}({said})" if said else name] = ALLOCATORS[name](**dict(zip(grid, values, strict=True)))
    return found


def measurement_key(allocator: Allocator) -> Allocator:
    """The same for all allocators that measure the same."""
    default = type(allocator)()
    return replace(allocator, **{key: getattr(default, key) for key in ONLY_IN_ASSIGN.get(allocator.name, ())})  # type: ignore[type-var]


def enter(
    name: str,
    allocator: Allocator,
    measures: Sequence[Mapping[str, Any]],
    sizes: Mapping[str, int],
    target: float,
    *,
    pattern: Pattern,
    probe: ModelOracle,
) -> Candidate:
    """What an allocator assigns, at the exact budget."""
    asked = probe if allocator.needs & {LOSS, REMEASURE} else None
    assigned = allocator.assign(measures, sizes, target, group=pattern.group, probe=asked)
    if set(assigned) != set(sizes):
        raise ValueError(f"allocator {allocator.name!r} returned other layers than it was given")
    kind = "uniform" if allocator.name == "uniform" else "single"
    return Candidate(name, kind, meet(assigned, sizes, target, pattern, mixes=allocator.mixes), allocator.to_dict())


def mixtures(best: Sequence[Candidate], sizes: Mapping[str, int], target: float, pattern: Pattern) -> list[Candidate]:
    """Each two of the `best` in equal parts."""
    made = []
    for one, other in itertools.combinations(best[:MIXED], 2):
        middle = {name: (one.sparsities[name] + other.sparsities[name]) / 2 for name in sizes}
        met = meet(middle, sizes, target, pattern)
        made.append(Candidate(f"{one.name} + {other.name}", "mixture", met, {"mixture": [one.name, other.name]}))
    return made


def group_by(names: Sequence[str], key: Callable[[str], str]) -> list[list[str]]:
    """Names of one key together, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def group_experts(names: Sequence[str]) -> list[list[str]]:
    """Layers that a plan is moved by: each by itself, but experts of one name as one, since few tokens reach each."""
    return group_by(names, lambda name: name.split("[")[0])
