"""The colours, the same in every format: two scales, ink and paper, and whether they can be told apart."""

from __future__ import annotations

from collections.abc import Sequence

INK, QUIET, PAPER = "#1f2328", "#59636e", "#f6f8fa"
EMPTY, HATCH, ACCENT, WORSE = "#e3e7eb", "#b3bcc5", "#0f5f9e", "#964e00"
# What a page draws in the colours of its theme instead: colour -> variable of templates/style.css.
THEMED = {INK: "ink", QUIET: "quiet", EMPTY: "empty", HATCH: "hatch", ACCENT: "accent", WORSE: "worse"}

# Viridis at ten even steps (matplotlib, CC0): lightness rises evenly, for every kind of colour vision.
SPARSITY = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725",
)  # fmt: skip
# Blue is less, orange is more, grey is no difference: two hues that the colour-blind tell apart.
DIFFERENCE = ("#154a80", "#4f86ba", "#a9c6de", "#f0f0f0", "#efc08e", "#cf7f2b", "#8f4a00")

# For an allocator's own numbers: the blue half of it, so that they are not taken for sparsities.
AMOUNT = ("#f0f0f0", "#a9c6de", "#4f86ba", "#154a80")


def shade(value: float, low: float, high: float, scale: Sequence[str]) -> str:
    """Returns the colour `#rrggbb` of a value between `low` and `high`, which take the ends of the scale."""
    position = min(max((value - low) / (high - low), 0.0), 1.0) * (len(scale) - 1)
    index = min(int(position), len(scale) - 2)
    pairs = zip(_channels(scale[index]), _channels(scale[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (position - index)):02x}" for a, b in pairs)


def contrast(one: str, other: str) -> float:
    """Returns the WCAG 2 contrast ratio of two colours, 1 to 21; text needs 4.5."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def ink_on(colour: str) -> str:
    """Returns black or white, whichever reads better; its contrast is at least 4.5 on any colour."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, colour))


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
