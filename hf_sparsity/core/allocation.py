"""Sparsities that depend linearly on importance, shared by OWL, DLP and LSA; and how sensitivities are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..validation import check_number

PER = ("block", "layer")
LOWEST = 0.01  # sparsity used in place of one of 0 or less (luuyin/OWL and ironartisan/DLP, lib/prune*.py)
# Half the span of the sparsities by target, as the authors of LSA choose it for their method and for DLP
# (BeiYazi0/LSA, layersp/blk.py and dlp.py); below 50 % theirs are 0.02 to 0.06. DLP's own code has the one at 70 %.
SPREADS = ((0.5, 0.04), (0.6, 0.1), (0.7, 0.15), (0.8, 0.12))


def check_spread(name: str, spread: float | None) -> None:
    """Raises ValueError unless `spread` is None or in [0, 0.5)."""
    if spread is not None:
        check_number(f"{name}: spread", spread, "[0, 0.5)", hint=", or None to choose it by the target")


def usual_spread(target: float) -> float:
    """Returns the spread for a target sparsity: `SPREADS`, with straight lines in between."""
    if target <= SPREADS[0][0]:
        return SPREADS[0][1]
    for (low, before), (high, after) in pairwise(SPREADS):
        if target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return SPREADS[-1][1]


def check_per(per: str) -> None:
    """Raises ValueError unless `per` is `"block"` or `"layer"`."""
    if per not in PER:
        raise ValueError(f"per={per!r} is unknown; use {' or '.join(map(repr, PER))}")


def groups_by_block_or_layer(measures: Sequence[Mapping[str, float]], per: str) -> list[tuple[tuple[str, ...], float]]:
    """Returns the groups that share one sparsity, in model order: (layers, the plain mean of their measures).

    A group is a block, or with `per="layer"` each layer by itself. Blocks without layers are left out.
    """
    if per == "layer":
        return [((name,), float(value)) for block in measures for name, value in block.items()]
    # The mean of equal values is that value, to the bit: a block's own measure stands at each of its layers.
    return [(tuple(block), _mean([float(v) for v in block.values()])) for block in measures if block]


def _mean(values: Sequence[float]) -> float:
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def normalized(importance: Sequence[float]) -> list[float]:
    """Returns importances scaled to [0, 1], the most important at 1; all 0 when they are equal or not numbers."""
    low, high = min(importance, default=0.0), max(importance, default=0.0)
    if not math.isfinite(math.fsum(importance)) or low == high:
        return [0.0] * len(importance)
    return [(d - low) * (1 / (high - low)) for d in importance]


def linear_sparsities(importance: Sequence[float], target: float, spread: float) -> list[float]:
    """Returns sparsities falling linearly with importance, `2 * spread` between the first and the last.

    Their plain mean is `target`, unweighted by size; one of 0 or less becomes 0.01, there is no cap. Equal
    importances give `target` everywhere. To the bit what OWL's and DLP's code does, in double precision.
    """
    scaled = [2 * spread * u for u in normalized(importance)]
    if not any(scaled):
        return [target] * len(scaled)
    mean = math.fsum(scaled) / len(scaled)
    density = [u - mean + (1 - target) for u in scaled]
    return [LOWEST if 1 - d <= 0 else 1 - d for d in density]


def rising_with_measure(
    measures: Sequence[Mapping[str, float]], per: str, target: float, spread: float | None
) -> dict[str, float]:
    """Returns each layer's sparsity, rising linearly with the measure of its block or layer (`per`).

    `spread`: half the span of the sparsities; None: by the target, see `usual_spread`.
    """
    parts = groups_by_block_or_layer(measures, per)
    spread = usual_spread(target) if spread is None else spread
    sparsities = linear_sparsities([-measure for _, measure in parts], target, spread)
    return {name: s for (names, _), s in zip(parts, sparsities, strict=True) for name in names}


def floored(sensitivities: Sequence[float]) -> list[float]:
    """Returns sensitivities in which (almost) zero ones, as of an idle expert, are raised to the least of the others."""
    tiny = 1e-12 * max(sensitivities)
    floor = min((f for f in sensitivities if f > tiny), default=1.0)
    return [f if f > tiny else floor for f in sensitivities]


def standard_logs(positive: Sequence[float]) -> list[float]:
    """Returns logarithms less their mean, in standard deviations; all 0 when they are equal."""
    logs = [math.log(f) for f in positive]
    centre = math.fsum(logs) / len(logs)
    spread = math.sqrt(math.fsum((x - centre) ** 2 for x in logs) / len(logs))
    return [(x - centre) / spread if spread > 1e-12 else 0.0 for x in logs]
