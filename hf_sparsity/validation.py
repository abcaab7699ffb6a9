"""Checks of numbers and choices that users give. Standard library only."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

COMPUTE_DTYPES = (
    "auto",
    "float32",
    "bfloat16",
    "model",
)  # what may be asked for; `model/precision.py` says what they mean


def check_compute_dtype(value: Any) -> None:
    """Raises ValueError unless `value` names a precision of computing."""
    if value not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype={value!r}: one of {', '.join(COMPUTE_DTYPES)} is expected")


def check_number(name: str, value: Any, within: str = "(-inf, inf)", *, whole: bool = False, hint: str = "") -> None:
    """Raises ValueError unless `value` is a number within an interval; True and False are none, nor are NaN and infinity.

    Args:
        name: what the number is called in the message, such as `"owl: spread"`.
        within: the interval as mathematicians write it: `"[0, 1)"` is at least 0 and below 1, `"(0, inf)"` above 0.
        whole: only an `int` will do.
        hint: the end of the message, such as `", or None to go by the target"`.
    """
    low, high, closed_below, closed_above = _bounds(within)
    if not isinstance(value, bool) and isinstance(value, int if whole else (int, float)):
        above = low <= value if closed_below else low < value
        if above and (value <= high if closed_above else value < high):
            return
    limits = [
        f"{'at least' if closed_below else 'above'} {low:g}" if low > -math.inf else "",
        f"{'at most' if closed_above else 'below'} {high:g}" if high < math.inf else "",
    ]
    bounds = " and ".join(limit for limit in limits if limit)
    raise ValueError(
        f"{name}={value!r} must be a {'whole ' if whole else ''}number{', ' if bounds else ''}{bounds}{hint}"
    )


@cache
def _bounds(within: str) -> tuple[float, float, bool, bool]:
    low, high = within[1:-1].split(",")
    return float(low), float(high), within[0] == "[", within[-1] == "]"
