"""Statistics of sums over units (documents, windows) with bootstrap intervals, several of them from the same draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..core.bootstrap import interval, resampled_sums
from ..records import Interval

CONFIDENCE = 0.95
RESAMPLES = 1000

Array = np.ndarray[Any, Any]


class Resampling:
    """Sums of quantities over units, float64, `[units, quantities]`, and their sums over units drawn with replacement.

    All quantities of a unit are drawn together, so statistics of several quantities are paired. Of one unit there is
    nothing to draw, and no statistic has an interval.
    """

    def __init__(self, sums: Array, resamples: int = RESAMPLES, seed: int = 0):
        self._total = sums.sum(axis=0)
        drawn = resampled_sums(torch.from_numpy(sums), resamples=resamples, seed=seed) if len(sums) > 1 else None
        self._drawn: Array | None = None if drawn is None else drawn.numpy()

    def interval(self, statistic: Callable[[Array], Array], confidence: float = CONFIDENCE) -> Interval:
        """Returns the value and the percentile interval of a function of sums `[..., quantities]`."""
        samples = None if self._drawn is None else torch.from_numpy(statistic(self._drawn))
        return interval(float(statistic(self._total)), samples, confidence)
