"""The paired bootstrap over sequences: confidence intervals of means, and of differences of means, measured on text.

Sequences are drawn with replacement, tokens of one sequence stay together (they depend on each other), and
what is compared is compared on the same sequences. Percentile intervals (Efron and Tibshirani, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import Interval

DRAWN = 2**22  # indices drawn at a time, 32 MiB


def resampled_sums(sums: Tensor, *, resamples: int = 1000, seed: int = 0) -> Tensor:
    """Returns sums over units drawn with replacement: `[units, columns]` -> float64 `[resamples, columns]`.

    All columns of a unit are drawn together, so that statistics of several columns are paired.
    """
    sums, count = sums.to("cpu", torch.float64), len(sums)
    draw = torch.Generator().manual_seed(seed)
    parts, left = [], resamples
    while left:
        now = min(left, max(1, DRAWN // count))
        drawn = torch.randint(count, (now, count), generator=draw)
        times = torch.zeros(now, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(now, count, dtype=torch.float64)
        )
        parts.append(times @ sums)
        left -= now
    return torch.cat(parts)


def resampled_means(values: Tensor, weights: Tensor, *, resamples: int = 1000, seed: int = 0) -> Tensor:
    """Returns the weighted mean of each column over sequences drawn with replacement, the same draws for all columns.

    Args:
        values: `[sequences]` or `[sequences, columns]`, each the mean over a sequence's tokens.
        weights: `[sequences]`, the number of tokens of each.

    Returns:
        float64 `[resamples]` or `[resamples, columns]`.
    """
    values, weights = values.to("cpu", torch.float64), weights.to("cpu", torch.float64)
    count = len(values)
    if count == 0 or weights.shape != (count,) or not bool((weights > 0).all()):
        raise ValueError(f"{count} values need as many positive weights, not {list(weights.shape)}")
    sums = torch.cat([values.reshape(count, -1) * weights[:, None], weights[:, None]], dim=1)
    total = resampled_sums(sums, resamples=resamples, seed=seed)
    return (total[:, :-1] / total[:, -1:]).reshape(resamples, *values.shape[1:])


def interval(value: float, samples: Tensor | None, confidence: float = 0.95) -> Interval:
    """Returns `value` with its percentile interval: the central part of `samples` `[resamples]` that holds this share of them.

    Without samples there is no interval. `ValueError` for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: a number between 0 and 1 is expected, such as 0.95")
    if samples is None:
        return Interval(value)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(samples.to(torch.float64), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def paired_bootstrap(
    differences: Tensor | Sequence[float],
    weights: Tensor | Sequence[float] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns a weighted mean over sequences with its interval.

    Args:
        differences: `[sequences]`, what one model has more than the other in the mean over a sequence's tokens; or any
            quantity of one model. Or pairs `[sequences, 2]`: the first minus the second.
        weights: `[sequences]`, the tokens of each; None: all alike.

    The interval of a function that only rises, such as exp, is that function of the two ends. One sequence says nothing
    about how sequences differ: low and high are then the value itself.
    """
    values = torch.as_tensor(differences, dtype=torch.float64)
    if values.ndim == 2 and values.shape[1] == 2:
        values = values[:, 0] - values[:, 1]
    if values.ndim != 1:
        raise ValueError(f"differences must be [sequences] or [sequences, 2], not {list(values.shape)}")
    shares = torch.ones_like(values) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    means = resampled_means(values, shares, resamples=resamples, seed=seed)
    return interval(float((values * shares).sum() / shares.sum()), means, confidence)
