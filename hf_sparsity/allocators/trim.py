"""TRIM: targeted row-wise iterative metric-driven pruning.

Beck et al., 2025, https://arxiv.org/abs/2505.16743.
Checked against the authors' code, flobk/TRIM, lib/trim.py (`calculate_row_wise_sparsities`) and lib/prune.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..algorithm import SCORES, Citation, Layer, RowAllocator
from ..core.stats import SAMPLES
from ..validation import check_number


@dataclass(frozen=True)
class TRIM(RowAllocator):
    """Rows whose outputs survive pruning better give up more of their weights, or, at negative rates, fewer.

    Starting from equal rows, each iteration moves the sparsity of a row by `rate` in proportion to the
    row's quality, keeps the mean, and remembers the best point by the quality of the whole layer. Rates
    are tried in turn until one does no better than the one before it. The outputs compared are those of
    the last token of each calibration sequence, without bias.

    The search is chaotic: a near-tie among scores may change one row's count, then all that follows. So
    equal inputs give equal rows, but another machine's rounding need not.
    """

    rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
    negative_rates: tuple[float, ...] = (-0.01, -0.02, -0.04)
    negative: bool = True  # try the negative rates when no positive one beats equal rows
    iterations: int = 10
    quality: str = "cosim_flat"  # of the layer, decides; qmetric of the authors
    row_quality: str = "cosim"  # of a row, steers; qmetric_dimwise of the authors
    cap: float = 0.95  # sparsity of a row, before the mean is restored

    name = "trim"
    paper = "https://arxiv.org/abs/2505.16743"
    summary = "rows of a layer differ, on top of any allocator"
    citation = Citation(
        "beck2025trim",
        "{TRIM}: Achieving Extreme Sparsity with Targeted Row-wise Iterative Metric-driven Pruning",
        "Florentin Beck and William Rudman and Carsten Eickhoff",
        2025,
        "2505.16743",
    )
    needs = frozenset({SAMPLES, SCORES})

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))  # JSON gives lists
        object.__setattr__(self, "negative_rates", tuple(self.negative_rates))
        if self.quality not in QUALITIES:
            raise ValueError(f"trim: quality {self.quality!r} is unknown; use one of {', '.join(QUALITIES)}")
        if self.row_quality not in ROW_QUALITIES:
            raise ValueError(
                f"trim: row_quality {self.row_quality!r} is unknown; use one of {', '.join(ROW_QUALITIES)}"
            )
        check_number("trim: iterations", self.iterations, "[1, inf)", whole=True)
        check_number("trim: cap", self.cap, "(0, 1]")

    def rows(self, layer: Layer) -> Tensor:
        """Sparsity of each row, float32 `[out]`, on the weight's device; the mean is `layer.sparsity`.

        Values may lie slightly outside [0, 1], as in the authors' code; `Layer.counts` clamps. A layer
        of sparsity 0 is left alone (the authors prune 1 % of it), and one that no token reached gets
        equal rows. `ValueError` when the samples or the scores are missing.
        """
        uniform = torch.full((layer.weight.shape[0],), layer.sparsity, device=layer.weight.device)
        if layer.stats is None or SAMPLES not in layer.stats.needs or layer.scores is None:
            raise ValueError(f"{layer.name}: trim needs input samples and scores; name SAMPLES and SCORES in `needs`")
        if layer.sparsity <= 0 or layer.stats.tokens == 0:
            return uniform
        inputs = layer.stats.samples.T.contiguous()
        order = layer.scores.argsort(dim=1, stable=True).to(inputs.device)
        best = self.search(layer.weight.to(inputs), inputs, order, layer.sparsity)
        return self.restore(best, layer.sparsity).to(uniform)

    def search(self, weight: Tensor, inputs: Tensor, order: Tensor, target: float) -> Tensor:
        """The best sparsities met, float32 `[out]`, before the last clamp and shift.

        `weight`: float32 `[out, in]`. `inputs`: float32 `[in, samples]`. `order`: int64 `[out, in]`, the
        columns of each row in the order in which they go.
        """
        outputs = Outputs(weight, inputs, order)
        start = torch.full((weight.shape[0],), target, device=inputs.device)
        outputs.move(start)
        first = outputs.pruned.clone(), outputs.counts
        best, chosen = outputs.quality(self.quality), start
        for rates in (self.rates, self.negative_rates if self.negative else ()):
            last = float("-inf")
            for rate in rates:
                outputs.reset(*first)
                quality, point = self.climb(outputs, start, rate=rate, target=target)
                if quality > best:
                    best, chosen = quality, point
                if not quality > last:
                    break
                last = quality
            if chosen is not start:
                break
        return chosen

    def climb(self, outputs: Outputs, start: Tensor, *, rate: float, target: float) -> tuple[float, Tensor]:
        """Runs the iterations at one rate from `start` `[out]`; returns (the best quality met, the point that has it).

        Each iteration continues from the latest point, not from the best.
        """
        best, chosen, point = outputs.quality(self.quality), start, start
        for _ in range(self.iterations):
            quality = ROW_QUALITIES[self.row_quality](outputs.by_row)
            low, high = quality.aminmax()
            delta = (quality - low) / (high - low + 1e-6) * (rate * 2)
            delta = (delta - delta.mean()).nan_to_num(0, 0, 0)  # psnr of a dead row is -inf
            point = self.restore((point + delta).float(), target)
            outputs.move(point)
            reached = outputs.quality(self.quality)
            if reached > best:
                best, chosen = reached, point
        return best, chosen

    def restore(self, point: Tensor, target: float) -> Tensor:
        """Clamps, then shifts to the target mean; in float32 and in this order, as the authors do."""
        point = point.clamp(0, self.cap)
        return point - point.mean() + target


class Moments(NamedTuple):
    """Sums over the elements of each vector compared, float64 `[vectors]`; enough for all qualities but mae."""

    dense: Tensor  # sum of squares of the dense output
    product: Tensor
    pruned: Tensor  # sum of squares of the pruned output
    peak: Tensor  # largest square of the dense output
    length: int


class Outputs:
    """The outputs of a layer, dense and with the first columns of each row pruned, updated cheaply as counts change.

    From one point to the next a row's count changes by a few weights, so only their contributions are
    added or subtracted: a sparse product with a hundredth of the work of the masked dense one, and no mask.
    Float32 sums drift by rounding alone over the iterations of one run.
    """

    def __init__(self, weight: Tensor, inputs: Tensor, order: Tensor):
        """`weight`: float32 `[out, in]`. `inputs`: float32 `[in, samples]`. `order`: int64 `[out, in]`."""
        self.weight, self.inputs, self.order = weight.contiguous(), inputs.contiguous(), order.contiguous()
        self.pruned = self.weight @ self.inputs  # float32 [out, samples]
        self.dense = self.pruned.double()
        self.wide = self.dense.clone()  # `pruned` in float64
        self.peaks = self.dense.square().amax(1)
        self.squares = dots(self.dense, self.dense)
        self.reset(self.pruned, torch.zeros(weight.shape[0], dtype=torch.int64, device=inputs.device))

    def reset(self, pruned: Tensor, counts: Tensor) -> None:
        """Returns to an earlier point, given by its outputs and the number of weights pruned in each row."""
        self.counts = counts
        self.pruned.copy_(pruned)
        self.wide.copy_(pruned)
        products, squares = dots(self.dense, self.wide), dots(self.wide, self.wide)
        self.by_row = Moments(self.squares, products, squares, self.peaks, self.dense.shape[1])

    def move(self, point: Tensor) -> None:
        """Moves the rows to the sparsities `point`, float32 `[out]`, truncated to counts in float32 as the authors do."""
        rows, width = self.weight.shape
        counts = (point * width).long().clamp_(0, width)
        lengths = (counts - self.counts).abs()
        row = torch.repeat_interleave(lengths)  # the row of each weight that comes or goes
        if len(row) > self.weight.numel() // 4:
            kept = torch.arange(width, device=row.device) >= counts[:, None]
            mask = torch.empty_like(kept).scatter_(1, self.order, kept)
            pruned = (self.weight * mask) @ self.inputs
        else:
            offsets = lengths.cumsum(0) - lengths
            begin = torch.arange(rows, device=row.device) * width
            place = (begin + torch.minimum(counts, self.counts) - offsets).index_select(0, row)
            place += torch.arange(len(row), device=row.device)
            column = self.order.view(-1).index_select(0, place)
            change = self.weight.view(-1).index_select(0, begin.index_select(0, row).add_(column))
            change *= (self.counts - counts).sign().float().index_select(0, row)
            pruned = self.pruned + embedding_bag(column, self.inputs, offsets, mode="sum", per_sample_weights=change)
        self.reset(pruned, counts)

    def quality(self, name: str) -> float:
        """Returns the quality of the whole layer's output, higher = better."""
        return float(QUALITIES[name](self).mean())

    @property
    def flat(self) -> Moments:
        """Returns all outputs as one vector."""
        dense, product, pruned, peak, length = self.by_row
        return Moments(dense.sum(0), product.sum(0), pruned.sum(0), peak.amax(0), length * len(dense))

    @property
    def by_sample(self) -> Moments:
        """The outputs of one token as a vector."""
        a, b = self.dense, self.wide
        return Moments(a.square().sum(0), (a * b).sum(0), b.square().sum(0), a.square().amax(0), len(a))


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, `[rows, n]` -> `[rows]`, without a product of that size in memory."""
    return torch.einsum("rn,rn->r", a, b)


def cosine(of: Moments) -> Tensor:
    """Cosine similarity; 0 where an output is all zero."""
    return (of.product / ((of.dense.sqrt() + 1e-8) * (of.pruned.sqrt() + 1e-8))).clamp(-1, 1)


def mse(of: Moments) -> Tensor:
    """Mean squared error; not negated."""
    return (of.dense - 2 * of.product + of.pruned).clamp(min=0) / of.length


def psnr(of: Moments) -> Tensor:
    """Peak signal to noise ratio in dB; -inf where the dense output is zero."""
    return 10 * torch.log10(of.peak / (mse(of) + 1e-10))


def snr(of: Moments) -> Tensor:
    """Signal to noise ratio in dB; inf where nothing is lost."""
    noise = mse(of)
    return (10 * torch.log10(of.dense / of.length / (noise + 1e-10))).masked_fill(noise < 1e-10, float("inf"))


# The authors' names; all higher = better.
ROW_QUALITIES: dict[str, Callable[[Moments], Tensor]] = {"cosim": cosine, "mse": lambda of: -mse(of), "psnr": psnr}
QUALITIES: dict[str, Callable[[Outputs], Tensor]] = {
    "cosim_flat": lambda outputs: cosine(outputs.flat),
    "cosim_dim": lambda outputs: cosine(outputs.by_row),
    "cosim_sample": lambda outputs: cosine(outputs.by_sample),
    "mse": lambda outputs: -mse(outputs.flat),
    "mse_dim": lambda outputs: -mse(outputs.by_row),
    "mae": lambda outputs: -(outputs.dense - outputs.wide).abs().mean(),
    "snr": lambda outputs: snr(outputs.flat),
    "psnr_flat": lambda outputs: psnr(outputs.flat),
    "psnr_dim": lambda outputs: psnr(outputs.by_row),
    "psnr_sample": lambda outputs: psnr(outputs.by_sample),
}
