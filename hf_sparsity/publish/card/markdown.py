"""Markdown that stays what it is meant to be, whatever strings and numbers from a checkpoint are put into it."""

from __future__ import annotations

import math
import re
from typing import Any

LONGEST = 200  # characters of a string from a checkpoint that are shown


def line(text: Any, longest: int = LONGEST) -> str:
    """Returns one line: white space and control characters become single blanks, what is too long is cut."""
    words = "".join(c if c.isprintable() else " " for c in str(text)).split()
    joined = " ".join(words)
    return joined if len(joined) <= longest else joined[: longest - 1] + "…"


def code(text: Any) -> str:
    """Returns a code span, in which neither Markdown nor HTML means anything."""
    shown = line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def block(text: str, language: str = "") -> str:
    """Returns a fenced block of code, its fence longer than any inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def slug(text: Any) -> str:
    """Returns letters, digits, dots, hyphens and underscores only: what the Hub takes as a tag or part of an id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)[:96]).strip("-.") or "unnamed"


def number(value: Any, what: str) -> float:
    """Returns a finite number; raises ValueError, which names `what`, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} is {line(value, 60)!r}; a number is expected")
    return float(value)


def decimals(value: float) -> str:
    """Returns a perplexity or a divergence with two decimals, three below 1, none above 1000."""
    if value == 0:
        return "0"
    size = abs(value)
    return (
        f"{value:.0f}"
        if size >= 1000
        else f"{value:.2f}"
        if size >= 1
        else f"{value:.3f}"
        if size >= 0.01
        else f"{value:.2g}"
    )


def percent(value: float) -> str:
    """Returns a share between 0 and 1 in percent."""
    return f"{100 * value:.1f} %"


def megabytes(size: int) -> str:
    """Returns bytes in units of 10^6, or 10^9 for large files."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"


def without_empty_lines(text: str) -> str:
    """Returns the text with one empty line wherever there were several."""
    return re.sub(r"\n{3,}", "\n\n", text)
