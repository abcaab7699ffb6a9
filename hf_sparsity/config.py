"""SparsityConfig: what the user asks for, validated the moment it is written down."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .algorithm import Algorithm, Allocator, Pattern, Pruner, RowAllocator
from .allocators import ALLOCATORS, ROW_ALLOCATORS
from .allocators.race import Race, Search
from .pruners import PRUNERS

A = TypeVar("A", bound=Algorithm)

CHOOSERS: dict[str, type[Allocator]] = {"race": Race, "search": Search}  # which allocator, is for the model to say


@dataclass(frozen=True)
class SparsityConfig:
    """How sparse, in which pattern, and by which algorithms.

    Args:
        sparsity: fraction of the prunable weights to remove, in [0, 1). May be left out for a fixed N:M.
        pattern: `"unstructured"`; `"N:M"`, N **kept** of every M consecutive inputs; `"*:M"`, N chosen per layer.
        allocator: how sparse each layer is. A name, `{"name": ..., hyperparameters}`, or an `Allocator`.
        row_allocator: how sparse each row of a layer is, likewise; None for the pruner's own way.
        pruner: which weights go, likewise.
        ignore: layers to leave dense: full names, ends of names (`"q_proj"`), module paths
            (`"model.layers.0"`) or globs (`"*.mlp.*"`). They do not count towards the sparsity.
        seed: of everything random.

    Raises:
        ValueError: unknown names (the nearest known ones are given) and contradictions.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    allocator: Allocator | str | Mapping[str, Any] = "uniform"
    row_allocator: RowAllocator | str | Mapping[str, Any] | None = None
    pruner: Pruner | str | Mapping[str, Any] = "wanda"
    ignore: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        pattern = Pattern.parse(self.pattern)
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen: the one place that sets)
        set_("pattern", str(pattern))
        set_("sparsity", _sparsity(self.sparsity, pattern))
        set_("allocator", resolve("allocator", self.allocator, ALLOCATORS | CHOOSERS, Allocator))
        set_("pruner", resolve("pruner", self.pruner, PRUNERS, Pruner))
        if self.row_allocator is not None:
            set_("row_allocator", resolve("row_allocator", self.row_allocator, ROW_ALLOCATORS, RowAllocator))
        set_("ignore", (self.ignore,) if isinstance(self.ignore, str) else self.ignore)
        if not isinstance(self.ignore, (list, tuple)) or not all(
            isinstance(name, str) and name for name in self.ignore
        ):
            raise ValueError(f"ignore={self.ignore!r}: names, module paths or globs are expected")
        set_("ignore", tuple(self.ignore))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: an integer is expected")

        assert isinstance(self.allocator, Allocator) and isinstance(self.pruner, Pruner)  # resolved above
        for name in self.allocator.candidates if isinstance(self.allocator, Race) else ():
            if name not in ALLOCATORS:
                raise ValueError(f"{self.allocator.name}: unknown candidate {name!r}{_nearest(name, list(ALLOCATORS))}")
        if pattern.kept is not None and self.allocator.name != "uniform":
            raise ValueError(
                f"pattern {self.pattern!r} fixes the sparsity of every layer, so allocator {self.allocator.name!r} has nothing "
                f"to decide; use allocator='uniform', or pattern='*:{pattern.group}' to choose N per layer"
            )
        if pattern.group is not None and self.row_allocator is not None:
            raise ValueError(
                f"pattern {self.pattern!r} fixes the sparsity of every row, so a row_allocator has nothing to decide; "
                "use pattern='unstructured', or row_allocator=None"
            )
        self.pruner.check(pattern, self.row_allocator is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; algorithms become `{"name": ..., hyperparameters}`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["ignore"] = list(self.ignore)
        return {k: v.to_dict() if isinstance(v, Algorithm) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """The reverse of `to_dict`; `ValueError` for unknown keys, names and hyperparameters."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a SparsityConfig is an object of names and values, not {data!r}")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"SparsityConfig has no {key!r}{_nearest(key, known)}")
        return cls(**data)


def resolve(role: str, given: Any, table: Mapping[str, type[A]], contract: type[A]) -> A:
    """A name, `{"name": ..., hyperparameters}` or an instance -> the instance; `ValueError` otherwise.

    Names are looked up in our literal tables only, so that loading a plan never imports what it names.
    """
    if isinstance(given, contract):
        return given
    name, arguments = given, {}
    if isinstance(given, Mapping):
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(
            f"{role}={given!r}: a name ({', '.join(table)}), {{'name': ..., hyperparameters}} or an instance of "
            f"{contract.__name__} is expected"
        )
    if name not in table:
        raise ValueError(
            f"unknown {role} {name!r}{_nearest(name, list(table))}; or pass an instance of your own {contract.__name__} as {role}="
        )
    known: dict[str, str] = {f.name: str(f.type) for f in fields(table[name])}  # type: ignore[arg-type]
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(f"{role} {name!r} has no hyperparameter {key!r}{_nearest(key, list(known))}")
        if not _fits(value, known[key]):
            raise ValueError(f"{role} {name!r}: {key}={value!r} is not of type {known[key]}")
    try:
        return table[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{role} {name!r}: {error}") from None


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value from JSON is what a hyperparameter is declared as, such as `float | None` or `tuple[float, ...]`."""
    if " | " in annotation:
        return any(_fits(value, part) for part in annotation.split(" | "))
    if annotation.startswith("tuple["):
        return isinstance(value, tuple) and all(_fits(item, annotation[6:].split(",")[0]) for item in value)
    if annotation == "None":
        return value is None
    kinds: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}
    # bool is an int to Python, but not to a user
    return isinstance(value, kinds[annotation]) and (annotation == "bool" or not isinstance(value, bool))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{hint} (known: {', '.join(known) or 'none'})"


def _sparsity(given: Any, pattern: Pattern) -> float:
    implied = pattern.sparsity
    if given is None:
        if implied is None:
            raise ValueError(
                f"sparsity is missing: give a number in [0, 1), or a fixed pattern such as '2:4' instead of {str(pattern)!r}"
            )
        return implied
    if isinstance(given, bool) or not isinstance(given, (int, float)) or math.isnan(given) or not 0 <= given < 1:
        raise ValueError(
            f"sparsity={given!r}: a number in [0, 1) is expected, the fraction of weights to remove (0.7, not 70)"
        )
    if implied is not None and abs(given - implied) > 1e-9:
        raise ValueError(
            f"sparsity={given} contradicts pattern={str(pattern)!r}, which keeps {pattern.kept} of {pattern.group} and so has sparsity "
            f"{implied:g}; leave sparsity out, or use pattern='*:{pattern.group}'"
        )
    if pattern.group is not None and given > 1 - 1 / pattern.group:
        raise ValueError(
            f"sparsity={given} is out of reach of pattern={str(pattern)!r}: at least 1 of {pattern.group} stays, so at most {1 - 1 / pattern.group:g}"
        )
    return float(given)


def algorithms(config: SparsityConfig) -> tuple[Allocator, Pruner]:
    """The config's allocator and pruner, as instances."""
    assert isinstance(config.allocator, Allocator) and isinstance(config.pruner, Pruner)  # SparsityConfig resolved them
    return config.allocator, config.pruner
