"""The plans that enter a race: every allocator with a small grid of its hyperparameters, and mixtures of the best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...algorithm import Allocator, Pattern
from ...allocators import ALLOCATORS
from ..budget import meet

MIXED = 4  # plans: the best ones, each two of which are mixed in equal parts
KINDS = ("uniform", "single", "mixture", "descent", "search")  # of plans, the simplest first


@dataclass(frozen=True)
class Candidate:
    """A plan that competes.

    Args:
        name: tells it apart, such as `"owl(outlier=5.0, spread=0.08)"`.
        kind: one of `KINDS`.
        sparsities: of each layer; together they meet the target.
        origin: how it was made, in JSON types.
    """

    name: str
    kind: str
    sparsities: Mapping[str, float]
    origin: Mapping[str, Any]


def allocators(names: Sequence[str]) -> dict[str, Allocator]:
    """Returns the allocators that compete, by a name that tells them apart; uniform comes first.

    `names`: of allocators; none means all that `enters_races`. Each enters with every point of its `race_grid`.
    """
    chosen = names or [name for name, allocator in ALLOCATORS.items() if allocator.enters_races]
    competing: dict[str, Allocator] = {}
    for name in dict.fromkeys(["uniform", *chosen]):
        grid = ALLOCATORS[name].race_grid
        for values in itertools.product(*grid.values()):
            options = dict(zip(grid, values, strict=True))
            competing[with_options(name, options)] = ALLOCATORS[name](**options)
    return competing


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """Returns the name with its options, such as `"owl(outlier=5.0, spread=0.08)"`."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})" if options else name


def measurement_key(allocator: Allocator) -> Allocator:
    """Returns the allocator with the hyperparameters that `measure` ignores at their defaults.

    Allocators with one key measure the same.
    """
    default = type(allocator)()
    return replace(allocator, **{key: getattr(default, key) for key in allocator.only_in_assign})  # type: ignore[type-var]


def mixtures(best: Sequence[Candidate], sizes: Mapping[str, int], target: float, pattern: Pattern) -> list[Candidate]:
    """Returns the means of each two of the first `MIXED` plans."""
    mixed = []
    for first, second in itertools.combinations(best[:MIXED], 2):
        means = {name: (first.sparsities[name] + second.sparsities[name]) / 2 for name in sizes}
        name, origin = f"{first.name} + {second.name}", {"mixture": [first.name, second.name]}
        mixed.append(Candidate(name, "mixture", meet(means, sizes, target, pattern), origin))
    return mixed


def group_by(names: Sequence[str], key: Callable[[str], str]) -> list[list[str]]:
    """Returns the names in groups of equal `key`, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def group_experts(names: Sequence[str]) -> list[list[str]]:
    """Returns groups of layers that move together: experts of one name, since few tokens reach each; others alone."""
    return group_by(names, lambda name: name.split("[")[0])
