"""The layerwise sparsities of plans as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..plan import Plan
from .tables import by_block_and_projection

try:
    import matplotlib
except ImportError as error:
    raise RuntimeError("drawing needs matplotlib: pip install 'hf_sparsity[plot]'") from error

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot


def draw_plans(plans: Mapping[str, Plan], file: Path) -> Path:
    """One panel a plan: blocks down, projections across, sparsity in percent as colour and number. Returns `file`."""
    tables = {
        name: by_block_and_projection(
            {n: x.sparsity for n, x in p.layers.items()}, {n: x.size for n, x in p.layers.items()}
        )
        for name, p in plans.items()
    }
    columns = min(4, len(tables))
    rows = -(-len(tables) // columns)
    blocks = max(len(table) for table in tables.values())
    values = [v for table in tables.values() for row in table.values() for v in row.values()]
    low, high = min(values), max(values)
    if high - low < 0.02:  # uniform plans only: a scale that does not shout about nothing
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, rows * (1.2 + 0.26 * blocks)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    image = None
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        projections = list(dict.fromkeys(p for row in table.values() for p in row))
        grid = [[row.get(p, float("nan")) for p in projections] for row in table.values()]
        image = axis.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(projections)), projections, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(table)), [block.rsplit(".", 1)[-1] for block in table], fontsize=7)
        if blocks <= 40:
            for y, row_values in enumerate(grid):
                for x, value in enumerate(row_values):
                    if value == value:
                        shade = "black" if value > (low + high) / 2 else "white"
                        axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=shade)
    for axis in axes[:, 0]:
        axis.set_ylabel("block", fontsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, format=lambda value, _: f"{100 * value:.0f} %")
        bar.set_label("weights removed", fontsize=8)
    figure.savefig(file, dpi=130, facecolor="white")
    pyplot.close(figure)
    return file
