"""SparsityConfig: what the user asks for, validated the moment it is written down."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, TypeVar

from .algorithm import GRAM, Algorithm, Allocator, Pattern, Pruner, RowAllocator
from .allocators import ALLOCATORS, ROW_ALLOCATORS
from .allocators.race import Race, Search
from .pruners import PRUNERS
from .validation import check_compute_dtype, check_number

A = TypeVar("A", bound=Algorithm)

CHOOSERS: dict[str, type[Race]] = {"race": Race, "search": Search}  # these compare allocators on the model itself

ALLOW_UNSEEN = 0.05  # share of the weights whose inputs need not be seen
REFINEMENTS = ("swaps",)  # what may improve a pruner's masks after it, see `core/swaps.py`
PARTS = ("vision", "audio")  # parts of a model beside its language model, which `include` names


@dataclass(frozen=True, init=False)
class SparsityConfig:
    """What a user asks for: how sparse, in which pattern, and by which algorithms.

    Args:
        sparsity: fraction of the prunable weights to remove, in [0, 1). May be left out for a fixed N:M.
        pattern: `"unstructured"`; `"N:M"`, N **kept** of every M consecutive inputs; `"*:M"`, N chosen per layer.
        allocator: how sparse each layer is. A name, `{"name": ..., hyperparameters}`, or an `Allocator`.
        row_allocator: how sparse each row of a layer is, given likewise; None leaves rows to the pruner.
        pruner: which weights go, given likewise.
        ignore: layers to leave dense: full names, ends of names (`"q_proj"`), module paths
            (`"model.layers.0"`) or globs (`"*.mlp.*"`). They do not count towards the sparsity.
        seed: of everything random.
        include: parts of a model that also sees or hears: `"vision"` and `"audio"` are pruned too, which are left dense by
            default. Calibration data for pruners that need it then have to have images or sound.
        refit: after pruning, set the weights that stay to their least-squares optimum on the calibration data; a row that
            would not gain stays as it was.
        refine: `"swaps"`: before the refit, exchange kept and removed weights one for one, within each row (and group, for
            N:M), as long as that lowers the squared change of the layer's outputs on the calibration data. It takes as
            long as ALPS and brings a refit with it.
        allow_unseen: share of the prunable weights, in [0, 1], that may lie in layers whose inputs no calibration data
            shows (the model does not use them on this data, or multiplies them where it cannot be observed). They
            are measured and pruned by magnitude, which the plan and the report say; more of them are an error.
        compute_dtype: the precision of forward passes: `"float32"`, `"bfloat16"`, `"model"` (that of the weights), or
            `"auto"`: the model's own where its device has instructions for it, else float32. Weights stay as they are
            stored; a block at a time is computed in this.

    Raises:
        ValueError: unknown names (the nearest known ones are given) and contradictions.
    """

    sparsity: float
    pattern: str
    allocator: Allocator | Race
    row_allocator: RowAllocator | None
    pruner: Pruner
    ignore: tuple[str, ...]
    seed: int
    include: tuple[str, ...]
    refit: bool
    refine: str | None
    allow_unseen: float
    compute_dtype: str

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        allocator: Allocator | Race | str | Mapping[str, Any] = "uniform",
        row_allocator: RowAllocator | str | Mapping[str, Any] | None = None,
        pruner: Pruner | str | Mapping[str, Any] = "wanda",
        ignore: str | Sequence[str] = (),
        seed: int = 0,
        include: str | Sequence[str] = (),
        refit: bool | None = None,
        allow_unseen: float = ALLOW_UNSEEN,
        refine: str | None = None,
        compute_dtype: str = "auto",
    ) -> None:
        parsed = Pattern.parse(pattern)
        check_number("seed", seed, whole=True)
        allocators: dict[str, type[Any]] = {**ALLOCATORS, **CHOOSERS}
        values = {
            "sparsity": _sparsity(sparsity, parsed),
            "pattern": str(parsed),
            "allocator": allocator
            if isinstance(allocator, Race)
            else resolve("allocator", allocator, allocators, Allocator),
            "row_allocator": None
            if row_allocator is None
            else resolve("row_allocator", row_allocator, ROW_ALLOCATORS, RowAllocator),
            "pruner": resolve("pruner", pruner, PRUNERS, Pruner),
            "ignore": _names(ignore),
            "seed": seed,
            "include": _parts(include),
            "refit": refine is not None if refit is None else refit,
            "refine": refine,
            "allow_unseen": allow_unseen,
            "compute_dtype": compute_dtype,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen: the one place that sets
        if not isinstance(refit, bool | None):
            raise ValueError(f"refit={refit!r}: True or False is expected")
        if refine not in (None, *REFINEMENTS):
            raise ValueError(f"refine={refine!r}: {', '.join(map(repr, REFINEMENTS))} or None is expected")
        if refine is not None and refit is False:
            raise ValueError(f"refine={refine!r} ends with a refit: leave refit=False out")
        if isinstance(allow_unseen, bool) or not isinstance(allow_unseen, (int, float)) or not 0 <= allow_unseen <= 1:
            raise ValueError(f"allow_unseen={allow_unseen!r}: a share of the weights is expected, from 0 to 1")
        check_compute_dtype(compute_dtype)
        self._check_together(parsed)

    def _check_together(self, pattern: Pattern) -> None:
        """Raises ValueError where one part leaves another nothing to decide, or the pruner cannot honour the pattern."""
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

    @property
    def pruning_needs(self) -> frozenset[str]:
        """What carrying out a plan has to know of each layer."""
        rows = self.row_allocator.needs if self.row_allocator else frozenset()
        return self.pruner.needs | rows | (frozenset({GRAM}) if self.refit else frozenset())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; algorithms become `{"name": ..., hyperparameters}`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["ignore"] = list(self.ignore)
        values["include"] = list(self.include)
        # Left out at their defaults, as in plans from before there was a choice.
        for later, default in {
            "include": [],
            "refit": False,
            "refine": None,
            "allow_unseen": ALLOW_UNSEEN,
            "compute_dtype": "auto",
        }.items():
            if values[later] == default:
                del values[later]
        return {k: v.to_dict() if isinstance(v, Algorithm) else v for k, v in values.items()}

    @classmethod
    def of(cls, given: Any) -> SparsityConfig:
        """Returns a config from a config or its dict; raises ValueError for anything else."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(
                f"config is a {type(given).__name__}; a SparsityConfig or its dict is expected, such as SparsityConfig(0.5)"
            )
        return cls.from_dict(given)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """The reverse of `to_dict`; `ValueError` for unknown keys, names and hyperparameters."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a SparsityConfig is an object of names and values, not {data!r}")
        names = [f.name for f in fields(cls)]
        for key in data:
            if key not in names:
                raise ValueError(f"SparsityConfig has no {key!r}{_nearest(key, names)}")
        return cls(**data)


def resolve(role: str, value: Any, table: Mapping[str, type[Any]], contract: type[A]) -> A:
    """Returns the algorithm that a name, `{"name": ..., hyperparameters}` or an instance stands for.

    Names are looked up in our literal tables only, so that loading a plan never imports what it names.

    Raises:
        ValueError: an unknown name or hyperparameter, a value of another type, or one that the algorithm refuses.
    """
    if isinstance(value, contract):
        return value
    name, arguments = value, {}
    if isinstance(value, Mapping):
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(
            f"{role}={value!r}: a name ({', '.join(table)}), {{'name': ..., hyperparameters}} or an instance of "
            f"{contract.__name__} is expected"
        )
    if name not in table:
        raise ValueError(
            f"unknown {role} {name!r}{_nearest(name, list(table))}; or pass an instance of your own {contract.__name__} as {role}="
        )
    declared = {f.name: f.type for f in fields(table[name])}
    hints = typing.get_type_hints(table[name])
    for key, argument in arguments.items():
        if key not in declared:
            raise ValueError(f"{role} {name!r} has no hyperparameter {key!r}{_nearest(key, list(declared))}")
        if not _is_a(argument, hints[key]):
            raise ValueError(f"{role} {name!r}: {key}={argument!r} is not of type {declared[key]}")
    try:
        return typing.cast(A, table[name](**arguments))
    except TypeError as error:
        raise ValueError(f"{role} {name!r}: {error}") from None


def _is_a(value: Any, hint: Any) -> bool:
    """Returns whether a value from JSON or the command line is what a hyperparameter's type hint says."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, UnionType):
        return any(_is_a(value, part) for part in arguments)
    if kind is typing.Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if kind is tuple and isinstance(value, tuple):
        parts = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(parts) == len(value) and all(_is_a(item, part) for item, part in zip(value, parts, strict=True))
    if hint is Any:
        return True
    if isinstance(value, bool):  # an int to Python, but not to a user
        return hint is bool
    plain = (int, float) if hint is float else kind or hint
    return not isinstance(plain, (type, tuple)) or isinstance(value, plain)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{hint} (known: {', '.join(known) or 'none'})"


def _sparsity(value: Any, pattern: Pattern) -> float:
    implied = pattern.sparsity
    if value is None:
        if implied is None:
            raise ValueError(
                f"sparsity is missing: give a number in [0, 1), or a fixed pattern such as '2:4' instead of {str(pattern)!r}"
            )
        return implied
    check_number("sparsity", value, "[0, 1)", hint=": the fraction of weights to remove, in [0, 1) (0.7, not 70)")
    if implied is not None and abs(value - implied) > 1e-9:
        raise ValueError(
            f"sparsity={value} contradicts pattern={str(pattern)!r}, which keeps {pattern.kept} of {pattern.group} and so has sparsity "
            f"{implied:g}; leave sparsity out, or use pattern='*:{pattern.group}'"
        )
    if pattern.group is not None and value > 1 - 1 / pattern.group:
        raise ValueError(
            f"sparsity={value} is out of reach of pattern={str(pattern)!r}: at least 1 of {pattern.group} stays, so at most {1 - 1 / pattern.group:g}"
        )
    return float(value)


def _parts(include: Any) -> tuple[str, ...]:
    parts = (include,) if isinstance(include, str) else include
    if not isinstance(parts, (list, tuple)) or not set(parts) <= set(PARTS):
        raise ValueError(f"include={include!r}: some of {', '.join(PARTS)} are expected")
    return tuple(part for part in PARTS if part in parts)


def _names(ignore: Any) -> tuple[str, ...]:
    names = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"ignore={ignore!r}: names, module paths or globs are expected")
    return tuple(names)
