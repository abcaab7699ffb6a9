"""How `SparsityCallback` gets to the sparsity of a plan while a model trains: `Gradual` steps, or `Elsa`.

What stands here are the choices a user has; `gradual.py` and `elsa.py` carry them out. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from ..validation import check_number

CURVES = ("cubic", "linear")
SCORES = ("magnitude", "wanda", "fisher")


def check_steps(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a share of the run in [0, 1] (float) or a number of optimizer steps (int)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{name}={value!r}: a share of the run in [0, 1] or an int, optimizer steps, is expected")
    if isinstance(value, float) and not value <= 1:
        raise ValueError(f"{name}={value!r}: as a float it is a share of the run, in [0, 1]; optimizer steps are ints")


def steps_of(value: float, total: int) -> int:
    """Returns optimizer steps for a share of a run of `total` steps (float), or for steps (int)."""
    return value if isinstance(value, int) else round(value * total)


@dataclass(frozen=True)
class Reallocation:
    """Says when and how the budgets of the layers are decided anew, on the half-pruned model as it is then.

    The layers' sparsities go from what they have to the new budgets; without regrowth none gets less sparse.

    Args:
        allocator: as for `SparsityConfig`: a name such as "fisher" or "owl", a dict with hyperparameters, a race.
        batches: calibration data for it, as for `make_plan`; None for allocators that look at weights only.
        at: when: shares of the run (floats) or optimizer steps (ints), between the schedule's start and end.
    """

    allocator: Any
    batches: Any = None
    at: Sequence[float] = (0.25, 0.5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        if not self.at:
            raise ValueError("at=() names no step at which budgets are decided anew: give at least one")
        for value in self.at:
            check_steps("at", value)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types; the data are left out."""
        name = self.allocator if isinstance(self.allocator, (str, Mapping)) else self.allocator.to_dict()
        return {"allocator": name, "at": list(self.at)}


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Masks that grow, a few weights at a time, until the plan is met.

    Args:
        curve: "cubic" (fast first, as in Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878) or "linear".
        start, end: when masks begin to grow and when they are complete: floats are shares of the run in [0, 1],
            ints are optimizer steps.
        interval: optimizer steps between two updates of the masks.
        scores: what decides which weights go: "magnitude"; "wanda", with norms of the inputs that are averaged over the
            updates; "fisher", the weight squared times the optimizer's second moment. By default the plan's pruner, which
            then has to be magnitude or wanda.
        regrow: share of the kept weights that are swapped at the first update for pruned ones with the largest gradients, as in
            RigL (Evci et al. 2020, https://arxiv.org/abs/1911.11134, which uses 0.3); it falls to 0 at the end, along a
            cosine. 0: what is pruned stays pruned.
        reallocate: budgets of the layers that are decided anew on the way; None keeps those of the plan.

    Raises:
        ValueError: an unknown name, or a number outside its range.
    """

    curve: str = "cubic"
    start: float = 0.0
    end: float = 0.75
    interval: int = 10
    scores: str | None = None
    regrow: float = 0.0
    reallocate: Reallocation | None = None

    name: ClassVar[str] = "gradual"

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(f"schedule={self.curve!r}: {' or '.join(map(repr, CURVES))} is expected")
        if self.scores is not None and self.scores not in SCORES:
            raise ValueError(f"scores={self.scores!r}: one of {', '.join(map(repr, SCORES))} or None is expected")
        check_number("interval", self.interval, "[1, inf)", whole=True, hint=": optimizer steps")
        check_number("regrow", self.regrow, "[0, 1)")
        check_steps("start", self.start)
        check_steps("end", self.end)

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"name": ..., options}` as plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["reallocate"] = self.reallocate.to_dict() if self.reallocate else None
        return {"name": self.name} | values


DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True)
class Elsa:
    """ADMM inside training: weights are pulled towards their own projection on the plan's sparsity, and projected at the end.

    Lee et al., "The Unseen Frontier", ICLR 2026, https://arxiv.org/abs/2510.01650. There every layer has the same
    sparsity; here each has its own, by the plan.

    Args:
        penalty: λ of the term `λ (w - z + u)` that is added to the gradients after they are clipped, at its largest. The
            authors' default is 0.01; small models, whose gradients are larger, want more (a toy of three blocks 0.3).
        curve: "cosine", by which the penalty rises from 0 to `penalty` at the end, or "constant".
        interval: optimizer steps between two projections.
        end: when the weights are projected for good; after that the zeros are held. A share of the run, or optimizer steps.
        importance: "fisher" projects by the optimizer's second moment times the square, the paper's objective-aware
            projection; "magnitude" by the square alone; "auto" is fisher where the optimizer has second moments.
        dtype: how z and u are stored: "float32", "bfloat16", or "float8_e4m3fn" with one scale for each parameter.

    Raises:
        ValueError: an unknown name, or a number outside its range.
    """

    penalty: float = 0.01
    curve: str = "cosine"
    interval: int = 32
    end: float = 1.0
    importance: str = "auto"
    dtype: str = "float32"

    name: ClassVar[str] = "elsa"
    start: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_number("penalty", self.penalty, "(0, inf)")
        check_number("interval", self.interval, "[1, inf)", whole=True, hint=": optimizer steps")
        check_steps("end", self.end)
        choices = {"curve": ("cosine", "constant"), "importance": ("auto", "fisher", "magnitude"), "dtype": DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {expected} is expected")

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"name": ..., options}` as plain JSON types."""
        return {"name": self.name} | asdict(self)


def as_schedule(schedule: Any, start: float, end: float, interval: int) -> Gradual | Elsa:
    """Returns what a callback's `schedule` means.

    Args:
        schedule: a `Gradual` or `Elsa`, the dict of one, or the name of a curve, which `start`, `end` and `interval`
            belong to.
        start, end, interval: as for `Gradual`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(schedule, (Gradual, Elsa)):
        return schedule
    if isinstance(schedule, Mapping):
        values = dict(schedule)
        kind = Elsa if values.pop("name", None) == Elsa.name else Gradual
        if values.get("reallocate") is not None:
            raise ValueError(
                "the schedule decides budgets anew, and its data are not in the checkpoint: pass the callback as it was made, "
                "and leave restore_callback_states_from_checkpoint off"
            )
        return kind(**values)
    return Gradual(curve=schedule, start=start, end=end, interval=interval)
