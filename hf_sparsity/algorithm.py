"""The contracts: what an allocator, a row allocator and a pruner are, and the `Layer` they see.

Algorithms are frozen dataclasses whose fields are their hyperparameters. Nothing is registered:
the tables in `allocators/__init__.py` and `pruners/__init__.py` name ours, and an instance of a
class from anywhere else may be passed wherever a name is accepted.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .core import masks
from .core.stats import GRAM, NORMS, SAMPLES, InputStats

__all__ = [
    "FISHER",
    "GRAM",
    "LOSS",
    "NORMS",
    "REMEASURE",
    "SAMPLES",
    "SCORES",
    "Allocator",
    "Cells",
    "Citation",
    "Layer",
    "ModelOracle",
    "Pattern",
    "Pruner",
    "RowAllocator",
]

# What an algorithm may need beyond the weight. NORMS, GRAM and SAMPLES are facts about a layer's
# inputs (`core/stats.py`); the rest is supplied by `planning/`.
SCORES = "scores"  # the pruner's importance of every weight, in `Layer.scores`
FISHER = "fisher"  # squared gradients of the loss, in `Layer.fisher`
LOSS = "loss"  # `ModelOracle.loss`
REMEASURE = "remeasure"  # `ModelOracle.remeasure`


@dataclass(frozen=True)
class Pattern:
    """The places where zeros may stand: anywhere, or at most `kept` non-zeros in each `group` of consecutive inputs.

    Written `"unstructured"`, `"2:4"` (2 **kept** of 4) or `"*:8"` (the number kept is chosen per layer).
    """

    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Returns the pattern that a text stands for; raises ValueError with what is allowed."""
        if isinstance(text, Pattern):
            return text
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+|\*):(\d+)", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"pattern {text!r} is unknown; use 'unstructured', 'N:M' such as '2:4', or '*:M' such as '*:8'"
            )
        kept, group = None if match[1] == "*" else int(match[1]), int(match[2])
        if not 2 <= group <= 128 or (kept is not None and not 1 <= kept < group):
            raise ValueError(f"pattern {text!r}: N kept of M needs 1 <= N < M and 2 <= M <= 128")
        return cls(kept, group)

    def __str__(self) -> str:
        if self.group is None:
            return "unstructured"
        return f"{'*' if self.kept is None else self.kept}:{self.group}"

    @property
    def sparsity(self) -> float | None:
        """The sparsity that a fixed N:M implies, else None."""
        return None if self.kept is None or self.group is None else 1 - self.kept / self.group

    def at(self, sparsity: float) -> Pattern:
        """Returns the pattern of a layer with this sparsity: `*:M` becomes N:M, or unstructured where nothing is pruned."""
        if self.group is None or self.kept is not None:
            return self
        kept = round((1 - sparsity) * self.group)
        return Pattern() if kept >= self.group else Pattern(max(kept, 1), self.group)

    @property
    def is_mixed(self) -> bool:
        """True if the number kept is chosen for each layer, `*:M`."""
        return self.group is not None and self.kept is None


@dataclass
class Layer:
    """One prunable weight matrix, as an algorithm sees it.

    `weight` is `[out, in]` in the model's dtype, whatever the storage order, and is not to be
    modified. `stats` holds what was asked for by `needs`; layers fed by the same tensor share it.
    `sparsity`, `pattern` and `rows` are what the plan wants of this layer (unset while measuring).
    """

    name: str
    weight: Tensor
    stats: InputStats | None = None
    scores: Tensor | None = None  # [out, in] float32, higher = keep; only when SCORES is needed
    fisher: float | None = None  # mean over sequences of the squared gradient norm; only for FISHER
    sparsity: float = 0.0
    pattern: Pattern = Pattern()
    rows: Tensor | None = None  # [out] float32 sparsity of each row, from the row allocator

    @property
    def counts(self) -> int | Tensor:
        """The number of weights of a row to prune: an int, or one int64 per row `[out]`.

        Truncated toward zero, in double precision for a layer's sparsity and in float32 for row
        sparsities, as the authors' code does (`algorithms`: Wanda; TRIM).
        """
        width = self.weight.shape[1]
        if self.rows is None:
            return int(width * self.sparsity)
        return (self.rows.to(torch.float32) * width).trunc().clamp_(0, width).to(torch.int64)

    def norm_scores(self, asker: str) -> Tensor:
        """`|W_ij| * norm(x_j)`, float32 `[out, in]`; `ValueError` that names the asker when there are no statistics."""
        if self.stats is None:
            raise ValueError(f"{self.name}: {asker} needs the norms of the layer's inputs: give calibration data")
        return self.weight.abs().to(torch.float32) * self.stats.norms

    def is_pruned(self, *, by_row: bool = True) -> bool:
        """True if the weight already has the zeros that are wanted: in each group or row, or else in the whole matrix."""
        kept = self.weight != 0
        if self.pattern.kept is not None and self.pattern.group is not None:
            whole = kept.shape[1] % self.pattern.group == 0
            return whole and bool((kept.unflatten(1, (-1, self.pattern.group)).sum(2) <= self.pattern.kept).all())
        width = self.weight.shape[1]
        if by_row or self.rows is not None:
            return bool((width - kept.sum(1) >= torch.as_tensor(self.counts, device=kept.device)).all())
        return int((~kept).sum()) >= int(kept.numel() * self.sparsity)

    def gram(self, asker: str) -> Tensor:
        """The Gram matrix of the inputs, float32 `[in, in]`; the identity if no token came, so that magnitude decides.

        Raises:
            ValueError: it was not collected; the message names the asker.
        """
        if self.stats is None or GRAM not in self.stats.needs:
            raise ValueError(f"{self.name}: {asker} needs the Gram matrix of the inputs; collect it by naming GRAM")
        gram = self.stats.gram
        if gram is None or not gram.diagonal().any():
            return torch.eye(self.weight.shape[1], device=self.weight.device)
        return gram

    def trace(self, asker: str) -> float:
        """The Fisher information; `ValueError` that names the asker when there is none."""
        if self.fisher is None or not math.isfinite(self.fisher):
            raise ValueError(f"{self.name}: {asker} needs the Fisher information, and it is {self.fisher}")
        return float(self.fisher)


class Citation(NamedTuple):
    """Enough of a paper on arXiv for a BibTeX entry; `year` is that of its first version there."""

    key: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """Address of the abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """Returns the BibTeX entry."""
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n  year = {{{self.year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n  url = {{{self.url}}}\n}}"
        )


class Algorithm:
    """What allocators, row allocators and pruners have in common: a name, a paper, `needs`, JSON.

    All that the package says about an algorithm (command line, model card, README) it reads from its class.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""  # address of the paper
    summary: ClassVar[str] = ""  # one line for the README's table: what it does
    citation: ClassVar[Citation | None] = None  # for the BibTeX of model cards
    needs: ClassVar[frozenset[str]] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., hyperparameters}`, plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class ModelOracle:
    """What an allocator may ask of the model while it assigns; each call costs forward passes.

    `loss(sparsities)`: calibration loss of the model masked to these sparsities (LOSS).
    `remeasure(sparsities)`: `measure` again, on the model masked to these sparsities (REMEASURE).
    `many`: `loss` of several candidates, which processes may share; by default one after the other.
    """

    seed: int = 0
    loss: Callable[[Mapping[str, float]], float] | None = None
    remeasure: Callable[[Mapping[str, float]], list[dict[str, Any]]] | None = None
    many: Callable[[Sequence[Mapping[str, float]]], list[float]] | None = None

    def losses(self, candidates: Sequence[Mapping[str, float]]) -> list[float]:
        """Returns the loss of each candidate."""
        if self.many is not None:
            return self.many(candidates)
        assert self.loss is not None
        return [float(self.loss(candidate)) for candidate in candidates]


class Allocator(Algorithm, ABC):
    """Decides the sparsity of each layer: `measure` a block at a time, then `assign` all at once."""

    returns_group_multiples: ClassVar[bool] = False  # `assign` itself returns multiples of 1/group for `*:M`
    measure_label: ClassVar[str] = ""  # what the numbers of `measure` are, in words, for pictures
    only_in_assign: ClassVar[tuple[str, ...]] = ()  # hyperparameters that `measure` never looks at
    race_grid: ClassVar[Mapping[str, Sequence[Any]]] = {}  # hyperparameter -> the values that a race tries
    enters_races: ClassVar[bool] = True  # also where the race's candidates are not named
    demo_options: ClassVar[Mapping[str, Any]] = {}  # hyperparameters for a demonstration of a few seconds

    @property
    def grid_steps(self) -> int:
        """`ModelOracle.loss` rounds sparsities to multiples of 1 / grid_steps; at most 255."""
        return 16

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """Returns a value for each layer of one block. Called block by block in model order, on the dense model."""
        return dict.fromkeys(block, 0.0)

    @abstractmethod
    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """Returns the sparsity of each layer, from the measures of all blocks.

        `measures` has one mapping a block, in model order; `sizes` the weights of each layer;
        `group` is M when the pattern is `*:M`. The caller meets the target exactly afterwards
        (`core/budget.py`), so a paper's own rounding and clamping may stay as published.
        """

    def number(self, measure: Any) -> float | None:
        """Returns the one number of a measure that the plan records, or None."""
        return None if measure is None else float(measure)


class RowAllocator(Algorithm, ABC):
    """Decides the sparsity of each row inside a layer whose sparsity is given."""

    @abstractmethod
    def rows(self, layer: Layer) -> Tensor:
        """Returns the sparsity of each row, float32 `[out]`, from `layer.sparsity` and the facts in `needs`."""


class Cells(NamedTuple):
    """The sets of weights within which a pruner compares scores: the smallest of each cell go, equally many of each.

    A cell is `columns` consecutive inputs, at most a layer's width: of one row, or of all rows if `across_rows`.
    """

    columns: int
    across_rows: bool = False


class Pruner(Algorithm, ABC):
    """Decides which weights of a layer go, and what becomes of the others."""

    updates_survivors: ClassVar[bool] = False  # `prune` also changes the weights that stay
    stand_in: ClassVar[str] = ""  # masks that a race judges plans by, where `prune` searches for better ones
    takes_zeros: ClassVar[bool] = False  # the zeros are there already, so that rows have nothing to decide
    without_inputs: ClassVar[str] = "pruned by magnitude"  # what becomes of a layer whose inputs nobody saw
    checked_against: ClassVar[str] = (
        ""  # a cheaper pruner of ours, whose result is taken where its output error is lower
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes `compared_within` say None for a class that overrides `mask` without it."""
        super().__init_subclass__(**kwargs)
        if "mask" in vars(cls) and "compared_within" not in vars(cls):
            cls.compared_within = _only_within_groups  # type: ignore[assignment, method-assign]

    def check(self, pattern: Pattern, has_rows: bool) -> None:
        """Raises ValueError when this pruner cannot honour the pattern, or row sparsities."""

    @abstractmethod
    def scores(self, layer: Layer) -> Tensor:
        """Returns the importance of each weight, float32 `[out, in]`, higher = keep."""

    def mask(self, layer: Layer, scores: Tensor) -> Tensor:
        """Returns the mask for `layer.sparsity`, `pattern` and `rows`: bool `[out, in]`, True = kept."""
        if layer.pattern.group is not None:
            if layer.pattern.kept is None:
                raise ValueError(f"{layer.name}: pattern {layer.pattern} must be resolved to N:M before pruning")
            return masks.keep_groups(scores, layer.pattern.kept, layer.pattern.group)
        return masks.keep_rows(scores, layer.counts)

    def compared_within(self, layer: Layer) -> Cells | None:
        """Returns the cells within which `mask` compares the scores of a layer without row sparsities.

        None when its masks do not follow from comparisons within cells: then masks are asked for one by one. A class
        that overrides `mask` overrides this too, or gets None for all but N:M patterns.
        """
        return Cells(layer.pattern.group or layer.weight.shape[1])

    def prune(self, layer: Layer) -> Tensor:
        """Returns the new weight `[out, in]`, in the layer's dtype, zero where pruned."""
        return self.prune_by_scores(layer)

    def prune_by_scores(self, layer: Layer) -> Tensor:
        """The weight with what the mask of its scores removes set to zero; no other weight changes."""
        scores = self.scores(layer) if layer.scores is None else layer.scores
        return layer.weight.masked_fill(~self.mask(layer, scores), 0)

    def prune_together(self, layers: Sequence[Layer]) -> list[Tensor]:
        """`prune` for several layers, in their order: those that share their `stats` by one `prune_sharing`."""
        groups: dict[int, list[int]] = {}
        for index, layer in enumerate(layers):
            groups.setdefault(id(layer.stats), []).append(index)
        results: dict[int, Tensor] = {}
        for same in groups.values():
            results.update(zip(same, self.prune_sharing([layers[i] for i in same]), strict=True))
        return [results[i] for i in range(len(layers))]

    def prune_sharing(self, layers: Sequence[Layer]) -> list[Tensor]:
        """`prune` for layers that share one `stats`; override it where sharing saves work."""
        return [self.prune(layer) for layer in layers]


def _only_within_groups(pruner: Pruner, layer: Layer) -> Cells | None:
    """`Pruner.compared_within` where nothing is known but that an N:M pattern compares within groups."""
    return Cells(layer.pattern.group) if layer.pattern.group is not None else None
