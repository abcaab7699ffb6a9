"""Tail exponents, which say how heavy the tail of an eigenvalue density is, and sparsities from them.

The power-law fits and the mapping of AlphaPruning (haiquanlu/AlphaPruning `lib/esd_utils.py`,
`lib/prune.py` `ww_sparsity`), shared by FARMS (HUST-AI-HYZ/FARMS). The authors score each candidate
start of the tail in a Python loop over the whole tail; here all exponents come from one suffix sum
of logarithms, and only the candidates that can still win are scored in full. The result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..validation import check_number

FITS = ("peak", "mid", "ks", "peak_fixed")
PER = ("block", "layer")
BINS = 100  # number of bins of the histogram of log10 eigenvalues, as published
CELLS = 1 << 20  # float64 numbers in one temporary of the KS scan: 8 MiB whatever the matrix


def check_choices(*, fit: str, per: str, spread: float, floor: float) -> None:
    """Raises ValueError for values of hyperparameters that AlphaPruning and FARMS do not have."""
    for field, value, allowed in (("fit", fit, FITS), ("per", per, PER)):
        if value not in allowed:
            raise ValueError(f"{field}={value!r} is unknown; use one of {', '.join(allowed)}")
    check_number("spread", spread, "[0, 1)")
    check_number("floor", floor, "[0, inf)")


def tail_exponent(eigenvalues: Tensor, fit: str = "peak", *, floor: float = 0.0) -> float | None:
    """Returns the exponent alpha of the power law that the largest eigenvalues follow, lower = heavier tail.

    `eigenvalues`: `[n]` float32, ascending, not negative. `fit` chooses where the tail starts:

    * `mid`: in the middle of the list. One fit, smooth in the weights.
    * `ks`: wherever the Kolmogorov-Smirnov distance to the power law is smallest.
    * `peak`: as `ks`, near the highest bar of the histogram of log10 eigenvalues; as published, with
      a lower bound that is a logarithm compared with eigenvalues, so it depends on the scale of W.
    * `peak_fixed`: the same with the bound that was meant, 0.95 of the bar's position.

    Eigenvalues at or below `floor` are left out, unless that is all of them (the authors'
    EVALS_THRESH is 1e-5, off by default). Where the authors' code divides by zero or returns 0:
    zeros never take part; a window without candidates gives the `mid` fit; None where no power law
    can be fitted at all (fewer than two different positive eigenvalues in the tail).
    """
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown; use one of {', '.join(FITS)}")
    kept = eigenvalues[eigenvalues > floor] if floor > 0 else eigenvalues
    kept = kept if kept.numel() else eigenvalues
    positive = kept[kept > 0]
    n, zeros = positive.numel(), kept.numel() - positive.numel()
    if n < 2:
        return None
    logs = positive.double().log()
    alphas = _exponents(logs)
    # Zeros below the middle do no harm and count, as published; above it the positive half is meant.
    middle = max(kept.numel() // 2 - zeros, 0) or n // 2
    candidates = torch.arange(0)
    if fit == "ks":
        candidates = torch.arange(n - 1, device=logs.device)
    elif fit != "mid":
        candidates = _near_peak(positive, as_published=fit == "peak")
    candidates = candidates[alphas[candidates].isfinite()]
    start = _closest(logs, alphas, candidates) if candidates.numel() else middle
    alpha = float(alphas[start])
    return alpha if math.isfinite(alpha) else None


def _exponents(logs: Tensor) -> Tensor:
    """Returns Hill's estimate for every start i of the tail: `1 + n / (sum_{j>=i} ln l_j - n ln l_i)`, n = N - i.

    `logs`: `[n]` float64 ascending. Infinite where all that follows is equal.
    """
    n = torch.arange(logs.numel(), 0, -1, dtype=logs.dtype, device=logs.device)
    excess = logs.flip(0).cumsum(0).flip(0) - n * logs
    # Equal eigenvalues leave only the rounding of the sum, a few ulp of its largest term.
    noise = 1e-14 * n * logs.abs().max()
    return torch.where(excess > noise, 1 + n / excess, math.inf)


def _near_peak(values: Tensor, *, as_published: bool) -> Tensor:
    """Returns the indices of the eigenvalues (not the last one) around the mode of the log spectrum; may be empty.

    The same float32 operations as the authors', because the mode is discontinuous in them.
    """
    logs = values.float().log10()
    low, high = logs.min(), logs.max()
    counts = torch.histc(logs, BINS, min=low.item(), max=high.item())
    edges = torch.linspace(low.item(), high.item(), BINS + 1, device=logs.device)
    peak = 10 ** edges[counts.argmax()]
    # As published: `log10` of the bound, compared with the eigenvalue itself.
    lowest = (0.95 * peak).log10() if as_published else 0.95 * peak
    start = values[:-1]
    return ((start >= lowest) & (start <= 1.5 * peak)).nonzero().flatten()


def _closest(logs: Tensor, alphas: Tensor, candidates: Tensor) -> int:
    """Returns the candidate whose tail is closest to its power law, the first one on ties.

    The distance is a maximum over the tail, so any sample of the tail bounds it from below. Sample
    coarsely, score the most promising candidate in full, drop all that are already worse, and repeat
    with finer samples: few candidates are ever scored in full, and those exactly.
    """
    best = math.inf
    for points in (32, 512, logs.numel()):
        bounds = _distances(logs, alphas, candidates, points)
        promising = candidates[bounds.argmin()].unsqueeze(0)
        best = min(best, float(_distances(logs, alphas, promising, logs.numel())))
        # 1e-12: the sampled and the full scan may round differently.
        candidates, bounds = (x[bounds <= best + 1e-12] for x in (candidates, bounds))
        if candidates.numel() == 1 or points >= logs.numel():
            break
    return int(candidates[bounds.argmin()])


def _distances(logs: Tensor, alphas: Tensor, candidates: Tensor, points: int) -> Tensor:
    """Returns the KS distance of each candidate's tail, over at most `points` positions spread over that tail.

    `max_j |1 - (l_{i+j} / l_i)^(1 - alpha_i) - j / n|`, j = 0 .. n-1. `candidates`: `[c]` int64.
    Returns `[c]` float64. Every position is visited when `points` reaches the tail's length.
    """
    parts = []
    for start in candidates.split(max(1, CELLS // points)):
        n = (logs.numel() - start)[:, None]
        step = torch.arange(min(points, int(n.max())), device=logs.device)
        # Evenly spread, first and last included; with enough points simply 0, 1, 2, ... n-1, n-1, ...
        spacing = ((n - 1) / max(points - 1, 1)).double().clamp_(min=1)
        j = (step * spacing).long().minimum(n - 1)
        theory = ((1 - alphas[start])[:, None] * (logs[start[:, None] + j] - logs[start][:, None])).exp_()
        parts.append((1 - theory - j / n).abs_().amax(dim=1))
    return torch.cat(parts)


def sparsities_by_exponent(
    alphas: Sequence[Mapping[str, float | None]],
    sizes: Mapping[str, int],
    target: float,
    *,
    spread: float,
    per: str = "block",
) -> dict[str, float]:
    """Returns sparsities that rise linearly with alpha (lighter tails), from `1 - spread` to `1 + spread` in proportion.

    `alphas`: one mapping a block, {layer: alpha or None}; `sizes`: weights per layer. `per="block"`
    first replaces the alphas of a block by their plain mean. As published nothing is clamped, so a
    value may exceed 1, and the numerator is rounded to float32. A layer without alpha gets the mean
    of its block's (or else of all); alphas all equal, or none known, give `target` everywhere.
    """
    fitted = [a for block in alphas for a in block.values() if a is not None]
    values: dict[str, float] = {}
    for block in alphas:
        here = [a for a in block.values() if a is not None] or fitted
        mean = math.fsum(here) / len(here) if here else 0.0
        values |= {name: mean if per == "block" or a is None else a for name, a in block.items()}
    if not values:
        return {}
    low, high = min(values.values()), max(values.values())
    if high == low:
        return dict.fromkeys(values, target)
    below, above = 1 - spread, 1 + spread
    relative = {name: (a - low) / (high - low) * (above - below) + below for name, a in values.items()}
    # An int64 tensor times a Python float is float32 in the authors' code; it can flip an int(C * ratio).
    numerator = float(torch.tensor(sum(sizes[name] for name in values), dtype=torch.float32) * target)
    scale = numerator / math.fsum(sizes[name] * r for name, r in relative.items())
    return {name: scale * r for name, r in relative.items()}
