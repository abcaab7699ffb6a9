"""Write the generated parts of README.md and docs/: algorithms, commands, the API, and the tables of results.

    python docs/render.py            # write them
    python docs/render.py --check    # say what is out of date, exit code 1

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. Algorithms come from their classes,
commands from the parser, the API from signatures and docstrings, and every number from a file in
`tests/benchmarks/results/`, which the command written in that file made.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hf_sparsity
from hf_sparsity.cli.main import COMMANDS, build_parser
from hf_sparsity.cli.tables import algorithms_markdown
from hf_sparsity.core.bootstrap import paired_bootstrap

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("commands", "api", "results", "performance", "formats")))
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 110  # columns of a help text


def results(name: str) -> dict[str, Any]:
    """Returns the file of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Returns a Markdown table; the first `left` columns are text, the others numbers."""
    rules = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rules, *rows])


# ---- what each part holds


def algorithms() -> str:
    """One row for each algorithm: role, name, what it does, paper; from what stands on its class."""
    return algorithms_markdown().strip()


def commands_table() -> str:
    """One row for each command."""
    parsers = _command_parsers()
    return table(["command", "what it does"], [[f"`{name}`", parsers[name].description or ""] for name in COMMANDS], 2)


def commands() -> str:
    """The help text of each command."""
    return "\n\n".join(f"## {name}\n\n```text\n{_help(parser)}\n```" for name, parser in _command_parsers().items())


def _command_parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDTH)
    return parser.format_help().strip()


def api() -> str:
    """Signature and docstring of each public name."""
    return "\n\n".join(_entry(name, getattr(hf_sparsity, name)) for name in hf_sparsity.__all__ if name[0] != "_")


def _entry(name: str, thing: Any) -> str:
    parts = [f"## {name}", f"```text\n{_signature(name, thing)}\n```", _markdown(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if attribute.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            title = _signature(f"{name}.{attribute}", function)
            parts += [f"### {name}.{attribute}", f"```text\n{title}\n```", _markdown(inspect.getdoc(function) or "")]
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, thing: Any) -> str:
    try:
        parameters = [str(p) for p in inspect.signature(thing).parameters.values() if p.name not in ("self", "cls")]
    except (TypeError, ValueError):
        return name
    text = re.sub(r"'([^'=(]+)'(?=[,=)]|$| =)", r"\1", f"{name}({', '.join(parameters)})")
    if len(text) <= WIDTH:
        return text
    return f"{name}(\n" + "\n".join(f"    {p.replace(chr(39), '') if ': ' in p else p}," for p in parameters) + "\n)"


def _markdown(docstring: str) -> str:
    """Google-style sections as lists: one item an entry."""
    lines = []
    for block in re.split(r"\n(?=(?:Args|Returns|Raises|Yields):\n)", docstring):
        title, _, body = block.partition(":\n")
        if title not in ("Args", "Returns", "Raises", "Yields"):
            lines.append(block.strip())
            continue
        body, _, rest = body.partition("\n\n")
        items = [" ".join(item.split()) for item in re.split(r"\n(?=\S)", textwrap.dedent(body)) if item.strip()]
        if title in ("Args", "Raises"):
            items = [re.sub(r"^([\w*`, ]+?): ", lambda m: f"`{m[1].strip('`')}`: ", item) for item in items]
            lines.append(
                {"Args": "**Arguments**", "Raises": "**Raises**"}[title] + "\n\n" + "\n".join(f"- {i}" for i in items)
            )
        else:
            lines.append(f"**{title}** " + " ".join(items))
        lines += [rest.strip()] if rest.strip() else []
    return "\n\n".join(lines)


def _cell(value: dict[str, float], digits: int, *, mark: str = "", span: bool = True) -> str:
    def number(v: float) -> str:
        return f"{v:.0f}" if v >= 100 else f"{v:.{digits}f}"

    both = f" ({number(value['low'])}–{number(value['high'])})" if span and "low" in value else ""
    return f"{number(value['mean'])}{both}{mark}"


ENOUGH = 10  # cells of a real model, from which on README shows them
SHOWN = ("wanda", "sparsegpt", "alps", "magnitude", "ria")  # pruners, as the columns come


def _real_cells() -> dict[str, Any] | None:
    """The benchmark of a real model, as far as it has come; None before its first cell."""
    path = RESULTS / "real_model.json"
    return results("real_model") if path.exists() else None


def _scored(cell: dict[str, Any], uniform: dict[str, Any] | None = None) -> str:
    """Perplexity with its interval, and ▼ or ▲ where its KL is below or above that of uniform beyond chance."""
    rows = torch.tensor(cell["windows"], dtype=torch.float64)
    loss = paired_bootstrap(rows[:, 1] / rows[:, 2], rows[:, 2])
    low, mean, high = (math.exp(min(x, 20.0)) for x in (loss.low, loss.value, loss.high))
    mark = ""
    if uniform is not None and uniform is not cell:
        other = torch.tensor(uniform["windows"], dtype=torch.float64)
        gap = paired_bootstrap(torch.stack([rows[:, 0], other[:, 0]], dim=1) / rows[:, 2:], rows[:, 2])
        mark = " ▼" if gap.high < 0 else " ▲" if gap.low > 0 else ""
    return _cell({"mean": mean, "low": low, "high": high}, 1, mark=mark)


def _real_table(made: dict[str, Any], allocators: tuple[str, ...] = ()) -> str:
    """One line for each sparsity and allocator, one column for each pruner; "-" for a cell that was not measured."""
    cells = {(c["target"], c["pattern"], c["allocator"], c["pruner"], c["recovery"]): c for c in made["cells"]}
    lines = []
    for target, pattern, recovery in dict.fromkeys((t, p, r) for t, p, _, _, r in cells if t):
        here = [a for t, p, a, _, r in cells if (t, p, r) == (target, pattern, recovery)]
        for allocator in dict.fromkeys(a for a in here if not allocators or a in allocators):
            line = [f"{100 * target:.0f} %" if pattern == "unstructured" else pattern]
            line.append(allocator + (f", {recovery}" if recovery else ""))
            for pruner in SHOWN:
                cell = cells.get((target, pattern, allocator, pruner, recovery))
                even = cells.get((target, pattern, "uniform", pruner, recovery))
                line.append(_scored(cell, even) if cell else "-")
            lines.append(line)
    return table(["sparsity", "allocator", *SHOWN], sorted(lines, key=lambda line: line[0]), left=2)


def _real_caption(made: dict[str, Any]) -> str:
    how = made["protocol"]
    dense = next(cell for cell in made["cells"] if cell["allocator"] == "dense")
    return (
        f"Perplexity of SmolLM2-135M-Instruct (**dequantized 4-bit weights**; dense: {_scored(dense)}), calibrated on "
        f"{how['sequences']} x {how['length']} tokens of {how['calibration']}, in {how['windows']} windows of {how['length']} "
        f"tokens spread over {how['heldout']}, each by itself; 95 % intervals by bootstrap over windows; ▼ less, ▲ more KL from "
        "the dense model than uniform, beyond chance:"
    )


def real_model() -> str:
    """All cells of a real model that were measured."""
    made = _real_cells()
    if made is None or len(made["cells"]) < 2:
        return "Not measured yet: `tests/benchmarks/real_model.py` says how."
    return f"{_real_caption(made)}\n\n{_real_table(made)}"


def quality() -> str:
    """Perplexity by allocator: of a real model as soon as enough of it was measured, until then of the embedded one."""
    made = _real_cells()
    if made is None or len(made["cells"]) < ENOUGH:
        return f"Held-out perplexity of the embedded model (dense: 13.55), mean of three calibration seeds:\n\n{embedded()}"
    return f"{_real_caption(made)}\n\n{_real_table(made, ('uniform', 'owl', 'alphapruning', 'race'))}"


def embedded() -> str:
    """Uniform, OWL, the best single allocator by its mean, and the race on the embedded model, at 50 and 70 %."""
    rows = results("allocators")["rows"]
    lines = []
    for target in (0.5, 0.7):
        for pruner in ("wanda", "sparsegpt"):
            means = {
                r["allocator"]: r["perplexity"]["mean"] for r in rows if (r["target"], r["pruner"]) == (target, pruner)
            }
            best = min((n for n in means if n not in ("race", "search", "uniform")), key=means.__getitem__)
            lines.append(
                [
                    f"{target:.0%}".replace("%", " %"),
                    pruner,
                    f"{means['uniform']:.2f}",
                    f"{means['owl']:.2f}",
                    f"{means[best]:.2f} ({best})",
                    f"**{means['race']:.2f}**",
                ]
            )
    return table(["sparsity", "pruner", "uniform", "owl", "best single", "race"], lines, left=2)


def pruners() -> str:
    """Perplexity and KL of each pruner on the embedded model, without a refit, with one, and with swaps before, by sparsity and allocator."""
    rows = results("pruners")["rows"]
    names = list(dict.fromkeys(r["pruner"] for r in rows))
    found = {(r["target"], r["pattern"], r["allocator"], r["pruner"], r["finish"]): r for r in rows}

    def cell(setting: tuple[Any, ...], pruner: str) -> str:
        shown = [found.get((*setting, pruner, finish)) for finish in ("none", "refit", "swaps")]
        return " → ".join(f"{r['perplexity']:.2f} ({r['kl']:.3f})" for r in shown if r)

    settings = sorted(
        {(r["target"], r["pattern"], r["allocator"]) for r in rows}, key=lambda s: (s[1] != "unstructured", *s)
    )
    lines = [
        [f"{s[0]:.0%}".replace("%", " %") if s[1] == "unstructured" else s[1], s[2], *(cell(s, p) for p in names)]
        for s in settings
    ]
    return table(["sparsity", "allocator", *names], lines, left=2)


def _allocators(metric: str, digits: int) -> str:
    rows = results("allocators")["rows"]
    columns = list(dict.fromkeys((r["target"], r["pruner"]) for r in rows))
    cells = {(r["target"], r["pruner"], r["allocator"]): r[metric] for r in rows}
    lines = []
    for name in dict.fromkeys(r["allocator"] for r in rows):
        line = []
        for column in columns:
            value, uniform = cells[(*column, name)], cells[(*column, "uniform")]
            mark = "" if name == "uniform" else " ▼" if value["mean"] < uniform["mean"] else " ▲"
            line.append(_cell(value, digits, mark=mark))
        lines.append([name, *line])
    return table(["allocator", *(f"{100 * t:.0f} % {p}" for t, p in columns)], lines)


def perplexities() -> str:
    """Held-out perplexity of every allocator: mean and range over the seeds."""
    return _allocators("perplexity", 2)


def divergences() -> str:
    """KL from the dense model of every allocator, nats a token: mean and range over the seeds."""
    return _allocators("kl", 3)


def recovery() -> str:
    """Held-out perplexity after each method of recovery."""
    lines = [
        [
            r["method"],
            _cell(r["70 % Wanda"], 2),
            r["gap_70"] or "",
            _cell(r["80 % SparseGPT"], 2),
            r["gap_80"] or "",
            str(r["cpu_seconds"] or ""),
        ]
        for r in results("recovery")["rows"]
    ]
    return table(["", "70 % Wanda", "gap closed", "80 % SparseGPT", "gap closed", "CPU s"], lines)


def train_to_sparsity() -> str:
    """Held-out perplexity of each way to 80 and 90 %, and its CPU seconds."""
    if not (RESULTS / "train_to_sparsity.json").exists():
        return "Not measured yet: `tests/benchmarks/train_to_sparsity.py` says how."
    rows = []
    for r in results("train_to_sparsity")["rows"]:
        cells = [r["80"], r["90"]]
        rows.append([r["way"], *(text for c in cells for text in _way(c))])
    return table(["", "80 %", "CPU s", "90 %", "CPU s"], rows)


def train_toy() -> str:
    """Held-out perplexity of each way to 80 and 90 % on the toy."""
    data = results("train_toy")
    rows = [["dense", *[f"{data['dense']:.2f}"] * 2]]
    rows += [[r["way"], *(f"{r[t]:.2f}" if t in r else "" for t in ("80", "90"))] for r in data["rows"]]
    return table(["", "80 %", "90 %"], rows)


def _way(cell: dict[str, float] | None) -> list[str]:
    return ["", ""] if cell is None else [f"{cell['perplexity']:.2f}", f"{cell['cpu_seconds']:.0f}"]


def speed() -> str:
    """Both sides of each benchmark of speed, and the command that runs it."""
    lines = [[r["what"], r["against"], r["result"], f"`{r['command']}`"] for r in results("speed")["rows"]]
    return table(["what", "against", "result", "command"], lines, left=4)


def streaming() -> str:
    """Highest resident memory while a model of 8B shape is streamed."""
    keys = ["pruner", "blocks", "on_disk", "peak_memory", "estimated", "sum"]
    lines = [[r[k] for k in keys] for r in results("streaming")["rows"]]
    return table(["pruner", "blocks", "on disk", "highest resident memory", "estimated", "the sum"], lines)


def devices() -> str:
    """What pruning holds on simulated accelerators and moves, by where the model is."""
    lines = [
        [
            row["where"],
            row["pruner"],
            *(f"{row[key]:.0f}" for key in ("stays", "peak", "in", "out")),
            *(f"{row[key]:.1f}" for key in ("weights_in", "weights_out", "waits")),
        ]
        for row in results("devices")["rows"]
    ]
    header = ["model", "pruner", "stays there", "above that at most", "in", "out", "trips in", "trips out", "waits"]
    return table(header, lines, 2)


def packed_layout() -> str:
    """The byte table of a packed weight, from the docstring of the code that writes it."""
    from hf_sparsity.checkpoint.bitmask import codec

    return f"```text\n{inspect.cleandoc(codec.__doc__ or '')}\n```"


RENDERERS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        algorithms,
        commands_table,
        commands,
        api,
        quality,
        real_model,
        embedded,
        pruners,
        perplexities,
        divergences,
        recovery,
        train_to_sparsity,
        train_toy,
        speed,
        streaming,
        devices,
        packed_layout,
    )
}


def rendered(text: str) -> str:
    """Returns a page with its generated parts written anew."""
    return PART.sub(lambda m: f"{m[1]}{RENDERERS[m[2]]()}\n{m[3]}", text)


def outdated() -> Iterator[tuple[Path, str]]:
    """Yields (page, what it should be) for each page that differs from it."""
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        if (after := rendered(before)) != before:
            yield path, after


def main() -> int:
    """Writes the pages, or with `--check` only names those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    options = parser.parse_args()
    pages = list(outdated())
    for path, text in pages:
        print(path.relative_to(ROOT))
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(options.check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())
