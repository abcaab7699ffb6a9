"""Text tables for the terminal: pure functions from plans and reports to strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..algorithm import Algorithm
from ..allocators import ALLOCATORS, ROW_ALLOCATORS
from ..config import SparsityConfig
from ..pictures.grid import by_block_and_projection, split_name
from ..plan import Plan, Report
from ..pruners import PRUNERS
from ..records import SourceScore
from ..streaming.memory import Estimate


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with aligned columns, the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def algorithms_markdown() -> str:
    """Returns the table of all allocators, row allocators and pruners, as markdown, from what their classes say."""
    roles: dict[str, Mapping[str, type[Algorithm]]] = {
        "allocator": ALLOCATORS,
        "row allocator": ROW_ALLOCATORS,
        "pruner": PRUNERS,
    }
    lines = ["| role | name | what it does | paper |", "|---|---|---|---|"]
    for role, table in roles.items():
        for number, (name, algorithm) in enumerate(table.items()):
            paper = (
                f"[{algorithm.paper.rsplit('/', 1)[-1].rpartition('=')[2]}]({algorithm.paper})"
                if algorithm.paper
                else ""
            )
            cells = [role if number == 0 else "", f"`{name}`", algorithm.summary, paper]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def plan_header(plan: Plan) -> str:
    """Returns what was asked for, in one line."""
    config = plan.config
    names = [f"{role} {config[role]['name']}" for role in ("allocator", "row_allocator", "pruner") if config.get(role)]
    model = plan.model.get("name") or plan.model.get("type") or "model"
    return f"{model}: sparsity {plan.target:g}, pattern {config.get('pattern', 'unstructured')}, {', '.join(names)}, seed {config.get('seed', 0)}"


def plan_table(plan: Plan, report: Report | None = None) -> str:
    """Returns sparsity in percent by block and projection: planned, or `reached/planned` where they differ."""
    sizes = {name: layer.size for name, layer in plan.layers.items()}
    planned = by_block_and_projection({n: x.sparsity for n, x in plan.layers.items()}, sizes)
    reached = by_block_and_projection({n: report.layers[n].sparsity for n in plan.layers}, sizes) if report else None
    projections = list(dict.fromkeys(p for row in planned.values() for p in row))

    def cell(block: str, projection: str) -> str:
        if projection not in planned[block]:
            return ""
        want = f"{100 * planned[block][projection]:.1f}"
        have = f"{100 * reached[block][projection]:.1f}" if reached else want
        return want if have == want else f"{have}/{want}"

    measures = {split_name(n)[0]: x.measure for n, x in plan.layers.items() if x.measure is not None}
    header = ["block", *projections, *(["measure"] if measures else [])]
    rows = [
        [
            block,
            *(cell(block, p) for p in projections),
            *([f"{measures.get(block, float('nan')):.4g}"] if measures else []),
        ]
        for block in planned
    ]
    return render(header, rows) + (
        "\n(percent of weights removed; reached/planned where rounding to whole weights differs)" if report else ""
    )


def before(what: Mapping[str, Any], memory: Estimate) -> str:
    """Returns what will be pruned, what stays dense, and the memory that it takes; `what` is from `describe`."""
    dense = "; ".join(f"{count} x {reason}" for reason, count in what["dense"].items()) or "nothing"
    return (
        f"to prune: {what['layers']} layers in {what['blocks']} blocks, {what['weights'] / 1e6:.1f}M weights, {100 * what['share']:.1f} % of the model\n"
        f"stays dense: {dense}\n"
        f"memory: about {memory.peak / 2**20:.0f} MiB = model {memory.model / 2**20:.0f} + hidden states {memory.hidden / 2**20:.0f}"
        f" + one block's work {memory.block / 2**20:.0f}"
        + (f"; disk: about {memory.disk / 2**20:.0f} MiB" if memory.disk else "")
        + "".join(f"\n{name}: about {need / 2**20:.0f} MiB" for name, need in memory.devices.items())
    )


def after(report: Report) -> str:
    """Returns the sparsity reached beside the target, and the layers that were treated differently."""
    lines = [
        f"reached a sparsity of {report.sparsity:.4f} (target {report.target:.4f}) over {len(report.layers)} layers"
    ]
    lines += [f"  {name}: {note}" for name, note in list(report.notes.items())[:20]]
    if len(report.notes) > 20:
        lines.append(f"  and {len(report.notes) - 20} more")
    return "\n".join(lines)


def errors(report: Report) -> dict[str, float] | None:
    """Returns the mean relative error of the layers' outputs before a refit and after it; None without one."""
    pairs = [(x.error_before_refit, x.error) for x in report.layers.values() if x.error_before_refit is not None]
    if not pairs:
        return None
    before, after = (sum(one or 0.0 for one in side) / len(pairs) for side in zip(*pairs, strict=True))
    return {"before": before, "after": after}


def refined(report: Report) -> str:
    """Returns a line on what a refit did to the outputs, and exchanges to the masks; "" without a refit."""
    mean = errors(report)
    if mean is None:
        return ""
    swapped = [layer.swapped for layer in report.layers.values() if layer.swapped is not None]
    exchanged = f"; {sum(swapped)} weights took another's place" if swapped else ""
    return f"mean error of the layers' outputs: {mean['before']:.2%} before the refit, {mean['after']:.2%} after{exchanged}"


def by_source(report: Report) -> str:
    """Returns lines that say how far the model departs from the dense one on each source of the calibration mix."""
    scores = {name: SourceScore.from_dict(entry) for name, entry in report.sources.items()}
    rows = [
        [
            name,
            f"{100 * score.weight:.1f}",
            str(score.sequences),
            f"{score.kl:.4f}",
            f"{score.dense:.2f}",
            f"{score.pruned:.2f}",
        ]
        for name, score in scores.items()
    ]
    return (
        render(["source", "percent", "sequences kept apart", "kl", "perplexity dense", "pruned"], rows)
        + "\n(kl: of the pruned model from the dense one, nats a token)"
    )


def demo_table(rows: Sequence[Mapping[str, Any]], dense: float, winner: str, config: SparsityConfig) -> str:
    """Returns the held-out perplexities of all allocators, uniform first."""
    body = [
        [
            row["allocator"] + (" *" if row["allocator"] == winner else ""),
            f"{row['heldout']:.2f}",
            f"{row['selection']:.2f}",
            f"{row['sparsity']:.4f}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    table = render(
        ["allocator", "held-out perplexity", "selection text", "sparsity", "seconds"],
        [["dense", f"{dense:.2f}", "", "0", ""], *body],
    )
    return f"{table}\n{100 * config.sparsity:.0f} % with {config.pruner.name}; * is best on the selection text, which is not the held-out text"
