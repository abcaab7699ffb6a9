"""Colours can be read on light and dark pages, and without colour."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from hf_sparsity.pictures import colours, pages

GITHUB_DARK, WHITE = "#0d1117", "#ffffff"


def test_text_has_contrast_in_light_and_dark_pages():
    """WCAG AA: 4.5. The paper of a PNG is opaque, so what it is laid on does not matter."""
    assert min(colours.contrast(ink, colours.PAPER) for ink in (colours.INK, colours.QUIET)) >= 4.5
    for scale in (colours.SPARSITY, colours.DIFFERENCE):
        shades = [colours.shade(i / 200, 0, 1, scale) for i in range(201)]
        assert min(colours.contrast(colours.ink_on(shade), shade) for shade in shades) >= 4.5
    style = (pages.TEMPLATES / "style.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media")[:2])
    assert (light["paper"], dark["paper"]) == (WHITE, GITHUB_DARK) and set(colours.THEMED.values()) <= set(light)
    for theme in (light, dark):
        assert min(colours.contrast(theme[ink], theme["paper"]) for ink in ("ink", "quiet")) >= 4.5
        for paper in ("paper", "mark"):
            assert colours.contrast(theme["ink"], theme[paper]) >= 4.5
            assert min(colours.contrast(theme[ink], theme[paper]) for ink in ("accent", "worse", "quiet")) >= 3
    assert not set(colours.THEMED) & {*colours.SPARSITY, *colours.DIFFERENCE, *colours.AMOUNT}
    assert colours.contrast("#000000", WHITE) == pytest.approx(21)


def test_lightness_rises_evenly_so_that_grey_would_do():
    def lightness(shade):
        y = 1.05 / colours.contrast(shade, WHITE) - 0.05
        return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y

    steps = [lightness(colours.shade(i / 9, 0, 1, colours.SPARSITY)) for i in range(10)]
    rises = [b - a for a, b in pairwise(steps)]
    assert min(rises) > 5 and max(rises) < 2 * min(rises)
    halves = [lightness(shade) for shade in colours.DIFFERENCE]
    assert halves[:4] == sorted(halves[:4]) and halves[3:] == sorted(halves[3:], reverse=True)
    assert abs(halves[0] - halves[-1]) < 10, "less and more weigh the same"
