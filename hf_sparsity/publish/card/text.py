"""The text of a model card, section by section: facts -> Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...config import CHOOSERS
from ...pictures.grid import make_grid
from ...records import Comparison
from .citations import PAPERS, RECOVERY
from .commands import BASE, TABLES, TEXT, as_text, commands
from .markdown import block, code, decimals, megabytes, percent, table
from .model_facts import Facts, field
from .quality import by_source, interval, quality

NEWLINE = "\n"  # no backslashes inside the braces of an f-string before Python 3.12
MARKER = "<!-- Rendered by hf_sparsity; `hf-sparsity card` replaces all of it."
_ORIGIN = (
    f"{MARKER} Every number comes from config.json, sparsity_report.json,\n"
    "sparsity_metrics.json and the weight files beside this card. -->"
)
_METHODS = {
    "lora": "low-rank adapters that cannot touch the zeros, merged into the weights at the end",
    "full": "all weights, the zeros held at zero",
    "reconstruct": "the model was pruned again by the same plan, and in each half of each block the weights left were trained "
    "to bring out what the dense model does there",
}


def body(facts: Facts, name: str, base: str | None, plot: str | None) -> str:
    """Everything after the metadata; `base` is the dense model's Hub id, `plot` the name of the picture, if there is one."""
    sections = [
        _ORIGIN,
        f"# {name}",
        summary(facts, base),
        "## Quality",
        quality(facts),
        *by_source(facts),
        *certificate(facts),
        "## Size",
        size(facts),
        "## Where the zeros are",
        zeros(facts, plot),
        "## How to use it",
        usage(facts, name),
        "## How it was made",
        making(facts),
        "## Limits",
        limits(facts),
        "## Papers",
        papers(facts),
    ]
    return "\n\n".join(sections) + "\n"


# ---- what it is


def summary(facts: Facts, base: str | None) -> str:
    """One paragraph."""
    dense = f"[{base}](https://huggingface.co/{base})" if base else code(facts.base)
    if facts.is_demo and not base:
        dense += " (the small Llama inside the package hf_sparsity)"
    by = " and ".join(_by(role, name) for role, name in facts.algorithms)
    words = [
        f"This is {dense} with **{percent(facts.zeros / facts.weights)} of the weights in its transformer blocks set to zero** "
        f"({facts.zeros:,} of {facts.weights:,} weights in {len(facts.plan.layers)} matrices"
        f"{'' if facts.report is not None else ', as planned; nobody counted'}).",
        f"{by[:1].upper()}{by[1:]}." if by else "",
        "The weights that are left were trained again afterwards."
        if facts.recoveries or _reconstruction(facts)
        else "The weights that are left were not trained again.",
    ]
    if compared := [text for text in facts.metrics.texts if text.against is not None]:
        text = compared[0]
        assert text.against is not None
        words.append(
            f"Perplexity on {code(text.name)} is {decimals(text.perplexity.value)}; the dense model's is "
            f"{decimals(text.against.perplexity.value)}."
        )
    words.append("It is an ordinary transformers model: nothing is wrapped around it.")
    return " ".join(word for word in words if word)


def _by(role: str, name: str) -> str:
    does = {
        "allocator": "decided how sparse each layer is",
        "row_allocator": "how sparse each row",
        "pruner": "chose which weights go",
    }
    if role == "allocator" and name == "uniform":
        return "every layer is equally sparse"
    if role == "allocator" and name in CHOOSERS:
        return "how sparse each layer is was decided on this model, by comparing many plans on calibration text"
    paper = TABLES[role][name].citation if name in TABLES[role] else None
    shown = f"[{name}]({paper.url})" if paper else code(name)
    return f"{shown} {does[role]}"


def certificate(facts: Facts) -> list[str]:
    """What the plan gains over uniform on text that nothing had seen, if a race or a search chose it; else nothing.

    Of a plan that was made on another model, what it gained there and gains here.
    """
    sections = []
    here, chosen = field(facts.stored, "pruned", "revalidation"), facts.plan.chosen
    if chosen is not None:
        table_, predictions = _compared(field(chosen, "certificate"))
        where = "text that nothing before had seen, with masks alone, before anything was trained"
        sections += [
            "## Why this plan",
            f"Of all plans that were compared{' on the model it was made on' if here else ''}, {code(str(field(chosen, 'winner')))} "
            f"won. On {predictions:,.0f} predictions of {where}:",
            table_,
        ]
    if here is not None:
        table_, predictions = _compared(here)
        origin = code(str(field(here, "made_on") or "another model"))
        sections += [
            "## A plan from another model",
            f"The plan was made on {origin}, whose layers have the same shapes. On {predictions:,.0f} predictions of calibration "
            f"text, with masks alone, on this model {_PAYS[field(here, 'pays')]}:",
            table_,
        ]
    return sections


_PAYS = {True: "it still pays", False: "**it does harm**", None: "it cannot be told from uniform"}


def _compared(made: Any) -> tuple[str, int]:
    """Returns (table of a comparison with uniform, number of predictions); `ValueError` if it is damaged."""
    compared = Comparison.from_dict(made)
    pairs = {"KL divergence from the dense model": compared.kl, "perplexity": compared.perplexity}
    rows = [
        [title, decimals(pair.uniform), decimals(pair.chosen), interval(pair.uniform_minus_chosen)]
        for title, pair in pairs.items()
    ]
    return table(["", "every layer alike", "this plan", "gained"], rows), compared.predictions


def _reconstruction(facts: Facts) -> bool:
    pruned = facts.stored.get("pruned")
    return isinstance(pruned, Mapping) and bool(pruned.get("reconstruction"))


# ---- what it takes


def size(facts: Facts) -> str:
    """Both layouts."""
    sizes = facts.sizes
    if sizes is None:
        return "When this card was made there were no weight files to measure, or not of the size that the plan says."
    measured, computed = "measured: the files here", "computed from the number of zeros"
    how = {True: measured, False: computed}
    rows = [
        ["dense: zeros stored like other numbers", megabytes(sizes.dense), how[sizes.stored == "dense"]],
        [
            "bitmask: one bit a weight, and the values that are not zero",
            f"{megabytes(sizes.bitmask)} ({percent(sizes.bitmask / sizes.dense)})",
            how[sizes.stored == "bitmask"],
        ],
    ]
    change = "unpack" if facts.packed else "pack"
    return (
        table(["layout", "all weights", "how known"], rows)
        + f"\n\n{code(f'hf-sparsity {change} FOLDER OUTPUT')} makes the other layout; the weights stay the same, bit for bit."
    )


def zeros(facts: Facts, plot: str | None) -> str:
    """The picture, or a table of blocks."""
    if plot:
        return (
            f"![Sparsity of each projection in each block]({plot})\n\nThe numbers behind it are in {code('config.json')} (planned) "
            f"and {code('sparsity_report.json')} (reached)."
        )
    try:
        grid = make_grid(facts.plan, facts.report)
    except ValueError:
        return f"There are too many blocks to show here; {code('config.json')} has the sparsity of every matrix."
    rows = []
    for name, cells in grid.cells.items():
        rows.append([code(name), *(percent(cells[p].shown) if p in cells else "" for p in grid.projections)])
    return "Share of zeros by block and projection.\n\n" + table(["block", *map(code, grid.projections)], rows)


# ---- how to use it, how it was made


def usage(facts: Facts, name: str) -> str:
    """Loading it, with and without this package."""
    kinds = facts.config.get("architectures")
    causal = isinstance(kinds, list) and kinds and str(kinds[0]).endswith(("ForCausalLM", "LMHeadModel"))
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    path = name if "/" in name else f"path/to/{name}"
    plain = (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{path}")\ntokenizer = AutoTokenizer.from_pretrained("{path}")'
    )
    if facts.packed:
        return (
            f"The weights here are in the bitmask layout, which takes {code('pip install hf_sparsity')} to read:\n\n"
            f"{block(f'import hf_sparsity  # tells transformers how to read the packed weights{NEWLINE}{plain}', 'python')}\n\n"
            f"Without that import, loading is an error. {code('hf-sparsity unpack FOLDER OUTPUT')} makes a folder that loads "
            "everywhere."
        )
    return (
        f"With plain transformers; no other package is needed:\n\n{block(plain, 'python')}\n\n"
        f"To store or send it smaller, {code('hf-sparsity pack FOLDER OUTPUT')}. A packed folder loads by the same lines, after "
        f"{code('pip install hf_sparsity')} and {code('import hf_sparsity')}."
    )


def making(facts: Facts) -> str:
    """Commands, settings and fingerprints."""
    parts = []
    if made := commands(facts):
        parts.append(block(as_text(made), "bash"))
        words = "\n".join(word for command in made for word in command)
        stands = {BASE: "for the dense model", TEXT: "for the text, whose name is not recorded"}
        if used := [f"{code(word)} stands {what}" for word, what in stands.items() if word in words]:
            parts.append(f"{', '.join(used)}. The fingerprints below tell whether you have the same.")
    else:
        parts.append("The config does not record one run that pruned it, so no command is given.")
    parts.append(table(["setting", "value"], _settings(facts), right=False))
    parts += [_recovery(done) for done in facts.recoveries]
    return "\n\n".join(part for part in parts if part)


def _settings(facts: Facts) -> list[list[str]]:
    plan, config = facts.plan, facts.plan.config
    pruned = facts.stored.get("pruned")
    reached = percent(facts.zeros / facts.weights) if facts.report is not None else "not counted"
    rows = [
        ["sparsity asked for, reached", f"{percent(plan.target)}, {reached}"],
        ["pattern", code(config.get("pattern"))],
    ]
    for role in TABLES:
        if isinstance(one := config.get(role), Mapping):
            values = ", ".join(f"{key}={value}" for key, value in one.items() if key != "name")
            rows.append([role.replace("_", " "), code(one.get("name")) + (f" with {code(values)}" if values else "")])
    if ignored := config.get("ignore"):
        rows.append(
            ["left dense on request", code(", ".join(map(str, ignored)) if isinstance(ignored, list) else ignored)]
        )
    rows.append(["seed", code(config.get("seed", 0))])
    rows.append(["text for planning", _data(plan.data)])
    if isinstance(pruned, Mapping):
        rows.append(["text for pruning", "the same" if pruned.get("data") == plan.data else _data(pruned.get("data"))])
    rows.append(["dense model", f"a hash of sampled weights {code(plan.model.get('weights') or 'unknown')}"])
    versions = {**plan.versions, **(_mapping(pruned, "versions") if isinstance(pruned, Mapping) else {})}
    rows.append(["versions", _versions(versions)])
    return rows


def _recovery(done: Mapping[str, Any]) -> str:
    """One run of `recover`."""
    method, steps, tokens = done.get("method"), done.get("steps"), done.get("tokens")
    how = _METHODS.get(str(method), "a method that this release does not know")
    long = [
        f"{steps:,} steps" if isinstance(steps, int) else "",
        f"{tokens:,} tokens" if isinstance(tokens, int) else "",
    ]
    teacher = done.get("teacher")
    words = [
        f"**Trained after pruning** ({code(method)}): {how}; {' and '.join(x for x in long if x) or 'length unknown'}."
    ]
    if teacher:
        words.append("The dense model was the teacher.")
    loss = [_mapping(done, "loss").get(when) for when in ("before", "after")]
    if all(isinstance(x, (int, float)) and math.isfinite(x) for x in loss):
        before, after = map(float, loss)  # type: ignore[arg-type]
        words.append(
            f"On {code(_mapping(done, 'data').get('heldout'))} sequences of the same text that it was not trained on, the loss went "
            f"from {before:.3f} to {after:.3f} nats a token."
        )
    words.append(f"Text: {_data(done.get('data'))}. Versions: {_versions(_mapping(done, 'versions'))}.")
    return " ".join(words)


def _data(data: Any) -> str:
    if not isinstance(data, Mapping):
        return "none needed"
    sequences, tokens = (x if isinstance(x, int) else code(x) for x in (data.get("sequences"), data.get("tokens")))
    return f"{sequences} sequences, {tokens} tokens, SHA-256 of the ids {code(data.get('sha256'))}"


def _versions(versions: Mapping[str, Any]) -> str:
    return code(", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown")


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


# ---- what to know, whom to cite


def limits(facts: Facts) -> str:
    """What the numbers above do not say."""
    grouped = any(layer.pattern != "unstructured" for layer in facts.plan.layers.values())
    points = [
        "**It is not faster by itself.** transformers multiplies by the zeros like by any other number. Speed needs kernels that "
        + (
            "use N:M groups, such as those for 2:4 on recent GPUs."
            if grouped
            else "skip zeros, and at this pattern they are rare."
        ),
        "**In memory it is as large as the dense model.** So it is on disk, unless it is packed.",
    ]
    if facts.metrics.texts:
        names = ", ".join(dict.fromkeys(code(text.name) for text in facts.metrics.texts))
        points.append(
            f"**Perplexity is measured on {names} only.** Other text, other languages and long contexts may have lost more; "
            + ("the tasks above say a little about them." if facts.metrics.tasks else "no task was run.")
        )
    if facts.plan.data or _mapping(facts.stored, "pruned").get("data"):
        points.append("**The calibration text decided what stayed.** What it has little of may have suffered most.")
    if skipped := _mapping(vars(facts.report), "skipped") if facts.report is not None else {}:
        reasons = Counter(map(str, skipped.values())).most_common(6)
        points.append("**Left dense:** " + "; ".join(f"{count} x {code(reason)}" for reason, count in reasons) + ".")
    if notes := facts.report.notes if facts.report is not None else {}:
        first, note = next(iter(notes.items()))
        points.append(f"**{len(notes)} matrices were treated differently**, such as {code(first)}: {code(note)}.")
    points.append(
        "**What the dense model gets wrong, this one does too**, its biases included. Pruning can change them, unevenly; nobody "
        "measured that here."
    )
    return "\n".join(f"- {point}" for point in points)


def papers(facts: Facts) -> str:
    """BibTeX of every algorithm; the address of a paper that has no entry; the names of algorithms that are not ours."""
    ours = {name: TABLES[role][name] for role, name in facts.algorithms if name in TABLES[role]}
    methods = [str(done.get("method")) for done in facts.recoveries] + (
        ["reconstruct"] if _reconstruction(facts) else []
    )
    cited = [algorithm.citation for algorithm in ours.values() if algorithm.citation]
    entries = dict.fromkeys([*cited, *(PAPERS[key] for method in methods for key in RECOVERY.get(method, ()))])
    parts = [block("\n\n".join(paper.bibtex() for paper in entries), "bibtex")] if entries else []
    addresses = {name: algorithm.paper for name, algorithm in ours.items() if not algorithm.citation}
    parts += [f"{code(name)}: {address}" for name, address in addresses.items() if address]
    if strange := [code(name) for role, name in facts.algorithms if name not in {*TABLES[role], *CHOOSERS}]:
        parts.append(f"{', '.join(strange)}: not part of hf_sparsity, and no paper is recorded.")
    return "\n\n".join(parts) or "No published method was used."
