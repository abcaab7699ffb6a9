"""The command lines that make a sparse model again, put together from what its config recorded."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...allocators import ALLOCATORS, ROW_ALLOCATORS
from ...calibration.mixture import SELF
from ...demo import NAME as DEMO
from ...pruners import PRUNERS
from ...records import SourceScore
from .markdown import number
from .model_facts import Facts, field

TABLES: dict[str, Mapping[str, Any]] = {"allocator": ALLOCATORS, "row_allocator": ROW_ALLOCATORS, "pruner": PRUNERS}
BASE, TEXT, ZEROS = "BASE_MODEL", "CALIBRATION_TEXT", "SPARSE_MODEL"  # stand for what is not recorded or not public
SHARE = 16 / 15  # sequences of a recovery for each one that it trains on: one in 16 is held out
RECOVER = ("lora", "full", "reconstruct", "distill")  # methods of `hf-sparsity recover`
OPTIONS = ("length", "batch", "accumulation", "lr", "rank", "seed")  # its options that a record has


def commands(facts: Facts) -> list[list[str]]:
    """Returns each command as a list of words, in order.

    Nothing where the model was not pruned in one run of this package, and nothing from the first training on that was not
    a run of `hf-sparsity recover`.
    """
    refitted = bool(facts.pruned.get("given"))
    if not facts.pruned or facts.gradual or (facts.plan.config.get("pruner") is None and not refitted):
        return []
    lines = [_refit(facts, "sparse")] if refitted else _prune(facts, "sparse")
    last = "sparse"
    for nth, record in enumerate(facts.recoveries, 1):
        if record.get("method") not in RECOVER:
            break
        output = "recovered" if len(facts.recoveries) == 1 else f"recovered-{nth}"
        lines.append(_recover(facts, record, last, output))
        last = output
    return lines


def as_text(lines: list[list[str]]) -> str:
    """Returns commands as text for a shell, one a line."""
    return "\n".join(" ".join(shlex.quote("".join(c if c.isprintable() else " " for c in w)) for w in c) for c in lines)


def is_expressible(facts: Facts) -> bool:
    """Returns whether the command line can say everything that the plan's config says."""
    return all(_algorithm(role, facts.plan.config.get(role)) is not None for role in TABLES)


def _prune(facts: Facts, output: str) -> list[list[str]]:
    pruned = facts.pruned
    again = any(record.get("method") == "reconstruct" for record in facts.recoveries)  # then `pruned` is about that run
    planning, pruning = facts.plan.data, None if again else pruned.get("data")
    start = ["hf-sparsity", "prune", _base(facts)]
    end = [*_reconstruct(pruned, again), "--output", output]
    if not is_expressible(facts):
        return [[*start, "--plan", "config.json", *_data(facts, pruning or planning, facts.sources), *end]]
    if planning and pruning and planning != pruning:
        plan = ["hf-sparsity", "plan", _base(facts), *_config(facts), *_data(facts, planning), "--output", "plan.json"]
        return [plan, [*start, "--plan", "plan.json", *_data(facts, pruning, facts.sources), *end]]
    return [[*start, *_config(facts), *_data(facts, planning or pruning, facts.sources), *end]]


def _refit(facts: Facts, output: str) -> list[str]:
    """The command for a model whose zeros were there before it was refitted."""
    words = ["hf-sparsity", "refit", ZEROS, "--dense", _base(facts), *_refine(facts)]
    return [*words, *_data(facts, facts.pruned.get("data"), facts.sources), "--output", output]


def _refine(facts: Facts) -> list[str]:
    refined = facts.plan.config.get("refine")
    return [f"--refine={refined}"] if isinstance(refined, str) else []


def _reconstruct(pruned: Mapping[str, Any], again: bool) -> list[str]:
    return ["--reconstruct"] if pruned.get("reconstruction") and not again else []


def _base(facts: Facts) -> str:
    return DEMO if facts.is_demo else facts.hub_id or BASE


def _config(facts: Facts) -> list[str]:
    config, words = facts.plan.config, []
    pattern = str(config.get("pattern", "unstructured"))
    if pattern == "unstructured" or pattern.startswith("*"):
        words += ["--sparsity", f"{facts.plan.target!r}"]
    if pattern != "unstructured":
        words += ["--pattern", pattern]
    for role in TABLES:
        if text := _algorithm(role, config.get(role)):
            words += [f"--{role.replace('_', '-')}", text]
    ignored = config.get("ignore")
    words += [f"--ignore={name}" for name in ignored] if isinstance(ignored, list) else []
    included = config.get("include")
    words += [f"--include={part}" for part in included] if isinstance(included, list) else []
    words += _refine(facts) or (["--refit"] if config.get("refit") is True else [])
    return [*words, "--seed", str(config.get("seed", 0))]


def _algorithm(role: str, algorithm: Any) -> str | None:
    """Returns `owl:outlier=7`, with what differs from the defaults; "" for none; None if the command line cannot say it."""
    if algorithm is None:
        return ""
    if not isinstance(algorithm, Mapping) or algorithm.get("name") not in TABLES[role]:
        return None
    defaults = {f.name: f.default for f in fields(TABLES[role][algorithm["name"]])}
    changed = []
    for key, value in algorithm.items():
        default = defaults.get(key)
        if key == "name" or value == (list(default) if isinstance(default, tuple) else default):
            continue
        if not isinstance(value, (bool, int, float, type(None))) and not (
            isinstance(value, str) and value.isidentifier()
        ):
            return None
        changed.append(f"{key}={value}")
    return ":".join([str(algorithm["name"]), *([",".join(changed)] if changed else [])])


def _data(facts: Facts, data: Any, mix: Mapping[str, SourceScore] | None = None) -> list[str]:
    """Returns the options for the calibration text, whose own name is recorded nowhere."""
    if not isinstance(data, Mapping):
        return []
    texts = [_source(name, source) for name, source in mix.items()] if mix else [] if facts.is_demo else [TEXT]
    words = ["--calibration", *texts] if texts else []
    sequences, tokens = data.get("sequences"), data.get("tokens")
    if isinstance(sequences, int) and isinstance(tokens, int) and sequences > 0:
        words += ["--sequences", str(sequences + _held_out(facts, mix))]
        words += ["--length", str(tokens // sequences)] if tokens % sequences == 0 else []
    return words


def _source(name: str, source: SourceScore) -> str:
    return f"{name if name == SELF else f'{name}={TEXT}'}@{source.weight:.6g}"


def _held_out(facts: Facts, mix: Mapping[str, SourceScore] | None) -> int:
    """Returns how many sequences of the calibration text pruning did not see, because they judge it."""
    if not mix:
        return 0
    if field(facts.stored, "pruned", "certificate") is not None:
        return int(number(field(facts.plan.chosen, "data", "certificate"), "the number of the certificate's sequences"))
    return sum(source.sequences for source in mix.values())


def _recover(facts: Facts, record: Mapping[str, Any], model: str, output: str) -> list[str]:
    options = record.get("options")
    options = options if isinstance(options, Mapping) else {}
    words = ["hf-sparsity", "recover", model, "--method", str(record.get("method"))]
    words += ["--teacher", _base(facts)] if record.get("teacher") else []
    if not (facts.is_demo and record.get("teacher")):
        words += ["--data", TEXT]
    steps = record.get("steps") or _steps(record)
    words += ["--steps", str(steps)] if isinstance(steps, int) else []
    for name in OPTIONS:
        value = options.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            words += [f"--{name}", str(value)]
    return [*words, "--output", output]


def _steps(record: Mapping[str, Any]) -> int | None:
    """Returns the steps of 8 sequences behind a reconstruction's number of sequences; None if the text had too few for them."""
    sequences = record["data"].get("sequences") if isinstance(record.get("data"), Mapping) else None
    if not isinstance(sequences, int) or not 2 < sequences < 2**40:
        return None
    steps = round((sequences - 1) / SHARE / 8)
    return steps if steps > 0 and math.ceil(steps * 8 * SHARE) + 1 == sequences else None
