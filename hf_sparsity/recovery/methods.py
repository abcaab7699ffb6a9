"""The methods of `recover` with their options and defaults.

Standard library only, so that the command reads names and defaults from here without importing torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..validation import check_number
from .schedules import Elsa, Gradual

if TYPE_CHECKING:
    from ..pruning.reconstruction import BlockReconstruction

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RecoveryMethod:
    """What all methods share: how much of the data is used, as `steps * batch` sequences.

    Raises:
        ValueError: a number that is not a whole number above 0, or both `steps` and `tokens`.
    """

    steps: int | None = None  # optimizer steps; the default depends on the method
    tokens: int | None = None  # tokens to use, instead of `steps`
    batch: int = 8  # sequences of a step

    name: ClassVar[str]
    default_steps: ClassVar[int]

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give steps or tokens, not both")
        for name in ("steps", "tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "[1, inf)", whole=True)
        check_number("batch", self.batch, "[1, inf)", whole=True)

    def resolved(self, *, length: int, width: int) -> Any:
        """Returns a copy with every default filled in, for sequences of `length` tokens and a model of hidden size `width`."""
        counted = self.default_steps if self.tokens is None else math.ceil(self.tokens / (self.batch * length))
        return replace(self, steps=self.steps or counted, tokens=None)


@dataclass(frozen=True, kw_only=True)
class Training(RecoveryMethod):
    """The options of the methods that train in transformers' `Trainer`; by default 200 steps.

    `hard`, `soft`, `hidden`, `temperature`, `top_k` and `hidden_blocks` weigh the losses when there is a teacher, see `Teacher`.
    """

    accumulation: int = 1  # parts that a batch is cut into to save memory
    lr: float | None = None  # largest learning rate of a cosine schedule; the default is `width_rate / width`
    hard: float = 1.0
    soft: float = 1.0
    hidden: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None  # compare the teacher's likeliest tokens only
    hidden_blocks: Sequence[int] | None = None  # the blocks whose hidden states count; by default all
    store: bool = False  # ask the teacher once, for all sequences, and train from what it said; needs `top_k`
    training: Mapping[str, Any] = field(default_factory=dict)  # more `TrainingArguments`

    default_steps = 200
    width_rate: ClassVar[float]  # learning rate times the model's width

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("accumulation", self.accumulation, "[1, inf)", whole=True)
        if self.batch % self.accumulation:
            raise ValueError(f"batch={self.batch} sequences cannot be cut into accumulation={self.accumulation} parts")
        if self.lr is not None:
            check_number("lr", self.lr, "(0, inf)")
        if self.store and (self.top_k is None or self.hidden):
            raise ValueError(
                "store=True keeps the teacher's likeliest tokens: give top_k, such as 64, and no hidden states"
            )
        object.__setattr__(self, "training", dict(self.training or {}))

    def resolved(self, *, length: int, width: int) -> Any:
        """Returns a copy with every default filled in."""
        lr = self.width_rate / width if self.lr is None else self.lr
        return replace(super().resolved(length=length, width=width), lr=lr)


# Adam's best learning rate goes with 1 / width (Yang et al. 2022): `width_rate` divided by the width of the embedded
# model is 6e-3 and 1e-3, where half and twice as much were worse on calibration text; 2.8e-4 and 4.7e-5 for 4096.


@dataclass(frozen=True, kw_only=True)
class MaskedLora(Training):
    """Trains adapters that cannot touch a zero (`sparse_lora`) on all planned layers, and merges them at the end."""

    rank: int = 16  # rank of the adapters; their alpha is twice that

    name = "lora"
    width_rate = 1.152

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rank", self.rank, "[1, inf)", whole=True)


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Training):
    """Trains all weights in float32, with every zero held (`SparsityCallback`)."""

    name = "full"
    width_rate = 0.192


@dataclass(frozen=True, kw_only=True)
class Distillation(Training):
    """Trains towards the dense teacher, every zero held: all weights in float32, or masked adapters if `rank` is given."""

    hard: float = 0.5
    rank: int | None = None  # of masked adapters; None trains all weights

    name = "distill"
    width_rate = 0.192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_number("rank", self.rank, "[1, inf)", whole=True)

    def resolved(self, *, length: int, width: int) -> Any:
        """Returns a copy with every default filled in; adapters have the learning rate of `MaskedLora`."""
        rate = (MaskedLora if self.rank else Distillation).width_rate
        chosen = self if self.lr is not None else replace(self, lr=rate / width)
        return super(Distillation, chosen).resolved(length=length, width=width)


@dataclass(frozen=True, kw_only=True)
class TrainToSparsity(Training):
    """Makes a dense model sparse while it trains, and less sparse ones sparser: masks grow until a plan is met (`Gradual`).

    Give the `plan`, or a `config` by which it is made on up to 128 of the training sequences.
    """

    plan: Any = None  # a Plan, its file or its dict
    config: Any = None  # a SparsityConfig or its dict
    schedule: Gradual | Elsa = field(default_factory=lambda: Gradual(end=0.6, scores="magnitude"))

    name = "gradual"
    width_rate = 0.192

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.plan is None) == (self.config is None):
            raise ValueError(
                f"method={self.name!r} trains to the sparsity of a plan: give plan or config, and one of them only"
            )
        kind = Elsa if self.name == "elsa" else Gradual
        if not isinstance(self.schedule, kind):
            raise ValueError(
                f"schedule is a {type(self.schedule).__name__}; method={self.name!r} takes {kind.__name__}(...)"
            )
        if isinstance(self.schedule, Gradual) and self.schedule.reallocate is not None:
            raise ValueError(
                "recover cannot resume budgets that are decided anew; use SparsityCallback in a Trainer for these"
            )


@dataclass(frozen=True, kw_only=True)
class TrainByElsa(TrainToSparsity):
    """Makes a dense model sparse while it trains, by ADMM with the training loss itself (`Elsa`)."""

    schedule: Gradual | Elsa = field(default_factory=lambda: Elsa(penalty=0.1, end=0.8))

    name = "elsa"


@dataclass(frozen=True, kw_only=True)
class Reconstruction(RecoveryMethod):
    """Prunes the teacher again by the model's plan, and trains each half-block towards the dense one.

    The number of zeros is the plan's, but they need not be in the same places. By default 128 sequences are used.
    """

    blocks: BlockReconstruction | None = None  # how each half-block is trained; by default `BlockReconstruction()`

    name = "reconstruct"
    default_steps = 16


METHODS: dict[str, type[RecoveryMethod]] = {
    method.name: method
    for method in (MaskedLora, FullFineTuning, Reconstruction, Distillation, TrainToSparsity, TrainByElsa)
}
KEYWORDS = {entry.name for method in METHODS.values() for entry in fields(method)} - {"blocks"} | {"reconstruct"}


def uses_adapters(method: RecoveryMethod) -> bool:
    """Returns whether a method trains masked adapters, which need peft."""
    return bool(getattr(method, "rank", None))


def as_method(method: Any, options: Mapping[str, Any]) -> RecoveryMethod:
    """Returns the method of a `recover` call.

    Args:
        method: a method, its name, or a `BlockReconstruction`, which stands for `Reconstruction(blocks=...)`.
        options: with a name, the method's options as keywords; those of other methods are ignored with a warning.

    Raises:
        ValueError: an unknown method, bad options, or options beside a method that has its own.
        TypeError: a keyword that no method has.
    """
    if unknown := options.keys() - KEYWORDS:
        raise TypeError(f"recover() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method={method!r}: one of {', '.join(METHODS)} is expected")
        chosen = METHODS[method]
        values = {"blocks" if name == "reconstruct" else name: value for name, value in options.items()}
        used = {entry.name for entry in fields(chosen)}
        if ignored := sorted(name for name in values.keys() - used if values[name] is not None):
            logger.warning("method=%r has no option %s, which is ignored", method, ", ".join(ignored))
        return chosen(**{name: value for name, value in values.items() if name in used})
    if options:
        name, kind = next(iter(options)), type(method).__name__
        raise ValueError(f"{name}= belongs to the method: write {kind}({name}=...)")
    if isinstance(method, RecoveryMethod):
        return method
    from ..pruning.reconstruction import BlockReconstruction  # not above, since it imports torch

    if isinstance(method, BlockReconstruction):
        return Reconstruction(blocks=method)
    expected = ", ".join(f"{kind.__name__}(...)" for kind in METHODS.values())
    raise ValueError(f"method is a {type(method).__name__}; one of {expected} or {', '.join(METHODS)} is expected")
