"""MRP: maximum redundancy pruning.

Gao, Zhao, Chen and Jing, https://arxiv.org/abs/2503.18377. The authors released no code: this is
**reconstructed** from the paper, and every choice it leaves open is a field.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithm import NORMS, REMEASURE, SCORES, Allocator, Citation, Layer, ModelOracle, Pattern, Pruner
from ..core.allocation import check_per
from ..core.budget import Curve, fill
from ..core.masks import keep_rows
from ..core.nested_masks import mask_levels, row_levels
from ..core.outliers import Survivors
from ..validation import check_number

logger = logging.getLogger(__name__)

SMALL, LARGE = 7.0, 10.0  # default M for targets up to 0.7, and above; too small an M inverts the order of blocks
HIGHEST = 0.95  # sparsity: the end of the grid, and the highest default cap


@dataclass(frozen=True)
class MRP(Allocator):
    """Prunes the most redundant block a little more, again and again, until the target is met.

    Redundancy is the non-outlier ratio (NOR) of the **pruned** block under the pruner's own scores: the
    fraction of weights whose score does not exceed M times the mean score, pruned ones counted as 0
    (`reading="D1"`); with `"D4"` the mean is the dense block's and the fraction that of the survivors.

    `refresh`: when scores are taken again from the sparse model: never (`"F0"`), each time the sparsity of the whole
    has grown by `growth` since the last measurement (`"F1"`), or after every step (`"F2"`); without
    `probe.remeasure` it is never. All layers of a block share its sparsity; with `per="layer"` (not in the paper) each
    layer is treated as a block of its own.
    """

    outlier: float | None = None  # M; default 7 up to a target of 0.7, 10 above
    start: float | None = None  # s0, the sparsity all blocks start from; default target - 0.15
    step: float = 0.01  # delta, what a block gives up at a time
    cap: float | None = None  # s_max; default the smaller of 0.95 and target + 0.20
    reading: str = "D1"
    refresh: str = "F1"
    growth: float = 0.02
    score: str = "pruner"  # or "wanda", for comparison with OWL
    per: str = "block"  # "block": one sparsity a block, "layer": one a layer

    name = "mrp"
    paper = "https://arxiv.org/abs/2503.18377"
    summary = "prunes the most redundant block a little more, again and again (reconstructed: no code was released)"
    citation = Citation(
        "gao2025maximum",
        "Maximum Redundancy Pruning: A Principle-Driven Layerwise Sparsity Allocation for {LLMs}",
        "Chang Gao and Kang Zhao and Jianfei Chen and Liping Jing",
        2025,
        "2503.18377",
    )
    needs = frozenset({SCORES, REMEASURE})
    measure_label = "redundancy (non-outlier ratio)"
    race_grid = {"refresh": ("F0",)}  # a refresh is a pass over the model for each step of the greedy loop

    def __post_init__(self) -> None:
        check_per(self.per)
        options = {"reading": ("D1", "D4"), "refresh": ("F0", "F1", "F2"), "score": ("pruner", "wanda")}
        for field, allowed in options.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"mrp: {field}={getattr(self, field)!r} is unknown; use one of {', '.join(allowed)}")
        check_number("mrp: step", self.step, "(0, inf)")
        check_number("mrp: growth", self.growth, "(0, inf)")
        if self.outlier is not None:
            check_number("mrp: outlier", self.outlier, "(0, inf)", hint=", or None to go by the target")
        needs = {SCORES if self.score == "pruner" else NORMS} | ({REMEASURE} if self.refresh != "F0" else set())
        object.__setattr__(self, "needs", frozenset(needs))

    def measure(self, block: Mapping[str, Layer], pruner: Pruner) -> dict[str, Any]:
        """A table of the block's NOR over sparsity, shared by its layers; or one of each layer.

        `{"sparsity": [s, ...], "nor": {M: [NOR at s, ...]}, "outliers": dense outlier ratio}`, exact for the masks
        of `pruner` at every s. To refresh, call it with the **dense** weights and the inputs of the sparse model.
        """
        if not block:
            return {}
        if self.per == "layer":
            return {name: self._table([layer], pruner) for name, layer in block.items()}
        return dict.fromkeys(block, self._table(list(block.values()), pruner))

    def _table(self, layers: list[Layer], pruner: Pruner) -> dict[str, Any]:
        scores = [self._scores(layer) for layer in layers]
        grid, levels = _levels(layers, scores, pruner)
        left = Survivors(scores, levels, len(grid))
        multiples = (SMALL, LARGE) if self.outlier is None else (self.outlier,)
        nor = {f"{m:g}": left.non_outlier_ratios(m, dense=self.reading == "D4") for m in multiples}
        return {"sparsity": grid, "nor": nor, "outliers": 1 - next(iter(nor.values()))[0]}

    def _scores(self, layer: Layer) -> Tensor:
        if self.score == "pruner" and layer.scores is not None:
            return layer.scores
        if self.score == "wanda" and layer.stats is not None:
            return layer.norm_scores(self.name)
        raise ValueError(f"{layer.name}: mrp with score={self.score!r} needs {', '.join(sorted(self.needs))}")

    def number(self, measure: Any) -> float | None:
        """The dense block's non-outlier ratio."""
        return None if measure is None else 1 - float(measure["outliers"])

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """Runs the greedy loop; `fill` distributes what is left when no block may take more.

        `start <= s <= cap`, and the weighted mean is `target`. Warns when blocks with more outliers end up
        sparser: M is then too small for the target, and the method's order inverted.
        """
        measures = self._parts(measures)
        weights = [sum(sizes[name] for name in block) for block in measures]
        start = max(0.0, target - 0.15) if self.start is None else self.start
        cap = max(target, min(HIGHEST, target + 0.20)) if self.cap is None else self.cap
        if not 0 <= start <= target <= cap < 1:
            raise ValueError(f"mrp: needs 0 <= start <= target <= cap < 1, not start={start}, {target=}, cap={cap}")

        def curves(new: Sequence[Mapping[str, Any]]) -> list[Curve]:
            return [self._curve(next(iter(block.values())), target) for block in self._parts(new)]

        def again(sparsities: Sequence[float]) -> list[Curve]:
            return curves(remeasure(_spread(measures, sparsities)))  # type: ignore[misc]

        remeasure = probe.remeasure if probe is not None and self.refresh != "F0" else None
        dense = curves(measures)
        sparsities = self._climb(dense, weights, (start, target, cap), again if remeasure else None)
        correlation = rank_correlation([round(s, 9) for s in sparsities], [-curve.redundancy[0] for curve in dense])
        if correlation > 0:
            message = "mrp: blocks with more outliers became sparser (rank correlation %+.2f); raise `outlier` (M)"
            logger.warning(message, correlation)
        return _spread(measures, sparsities)

    def _parts(self, measures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Returns the groups that share one sparsity: blocks, without those that have no layers, or single layers."""
        if self.per == "layer":
            return [{name: table} for block in measures for name, table in block.items()]
        return [block for block in measures if block]

    def _curve(self, table: Mapping[str, Any], target: float) -> Curve:
        multiple = self.outlier or (SMALL if target <= 0.7 + 1e-9 else LARGE)
        if f"{multiple:g}" not in table["nor"]:
            raise ValueError(f"mrp: measured for outlier = {', '.join(table['nor'])}, not {multiple:g}; measure again")
        # Small blocks lose no outlier, narrow layers not even a weight, in some steps: that is no reason to freeze.
        points = list(zip(table["sparsity"], table["nor"][f"{multiple:g}"], strict=True))
        points = [p for i, p in enumerate(points) if i == 0 or p[1] != points[i - 1][1]]
        return Curve([s for s, _ in points], [nor for _, nor in points])

    def _climb(
        self,
        curves: list[Curve],
        weights: Sequence[int],
        bounds: tuple[float, float, float],
        again: Callable[[Sequence[float]], list[Curve]] | None,
    ) -> list[float]:
        """Sparsities of the blocks, from `bounds` = (start, target, cap); `again(sparsities)` gives fresh curves."""
        start, target, cap = bounds
        total = sum(weights)
        sparsities, budget = [start] * len(weights), (target - start) * total
        measured, free = 0.0, {i for i in range(len(weights)) if start < cap}
        nor = [curve.at(start) for curve in curves]
        while free and budget > 1e-12 * total:
            whole = target - budget / total
            if again and whole > measured and (self.refresh == "F2" or whole - measured >= self.growth - 1e-9):
                curves, measured = again(sparsities), whole
                nor = [curve.at(s) for curve, s in zip(curves, sparsities, strict=True)]
            k = max(free, key=lambda i: (nor[i], i))
            by = min(self.step, budget / weights[k], cap - sparsities[k])
            sparsities[k] += by
            budget -= by * weights[k]
            before, nor[k] = nor[k], curves[k].at(sparsities[k])
            if nor[k] >= before or sparsities[k] >= cap - 1e-12:
                free.discard(k)
        if budget > 1e-12 * total:
            return fill(curves, weights, target, floor=sparsities, cap=cap)
        return sparsities


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values]

    def centred(values: Sequence[float]) -> Tensor:
        rank = torch.tensor(ranks(values), dtype=torch.float64)
        return rank - rank.mean()

    x, y = centred(a), centred(b)
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def _spread(measures: Sequence[Mapping[str, Any]], sparsities: Sequence[float]) -> dict[str, float]:
    return {name: s for block, s in zip(measures, sparsities, strict=True) for name in block}


def _levels(layers: Sequence[Layer], scores: Sequence[Tensor], pruner: Pruner) -> tuple[list[float], list[Tensor]]:
    """A grid of sparsities from 0 on, and for each weight at how many of them `pruner` keeps it, uint8 `[out, in]`.

    The grid: 0, 0.01 .. 0.95 for masks decided row by row, which one sort gives for all sparsities; multiples of
    1 / M for layers with a pattern of groups; for other masks, asked for one by one, 0, 0.05 .. 0.95.
    """
    group = layers[0].pattern.group
    if group is not None:
        grid = [1 - n / group for n in range(group, 0, -1)]
        wanted = [{"pattern": Pattern(n, group), "sparsity": s} for n, s in zip(range(group, 0, -1), grid, strict=True)]
    else:
        half = replace(layers[0], sparsity=0.5)
        by_rows = torch.equal(pruner.mask(half, scores[0]), keep_rows(scores[0], half.counts))
        grid = [i / 100 for i in range(0, 96, 1 if by_rows else 5)]
        if by_rows:
            counts = [[replace(layer, sparsity=s).counts for s in grid] for layer in layers]
            return grid, [row_levels(a, c) for a, c in zip(scores, counts, strict=True)]  # type: ignore[arg-type]
        wanted = [{"sparsity": s} for s in grid]
    return grid, [
        mask_levels((pruner.mask(replace(layer, **changes), score) for changes in wanted), score)  # type: ignore[arg-type]
        for layer, score in zip(layers, scores, strict=True)
    ]
