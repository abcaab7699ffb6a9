"""The command lines that make a sparse model again, put together from what its config recorded."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...allocators import ALLOCATORS, ROW_ALLOCATORS
from ...calibration.mixture import SELF
from ...pruners import PRUNERS
from .markdown import number
from .model_facts import DEMO, Facts, field

TABLES: dict[str, Mapping[str, Any]] = {"allocator": ALLOCATORS, "row_allocator": ROW_ALLOCATORS, "pruner": PRUNERS}
BASE, TEXT = "BASE_MODEL", "CALIBRATION_TEXT"  # stand for what is not recorded or not public
SHARE = 16 / 15  # of a recovery's sequences to those it trains on: one in 16 is held out
TRAINED = ("length", "batch", "accumulation", "lr", "rank", "seed")  # options of `hf-sparsity recover`


def commands(facts: Facts) -> list[list[str]]:
    """Each command as a list of words, in order; none where pruning was not one run of ours."""
    if not isinstance(facts.stored.get("pruned"), Mapping) or facts.plan.config.get("pruner") is None:
        return []
    made = _prune(facts, "sparse")
    last = "sparse"
    for nth, done in enumerate(facts.recoveries, 1):
        output = "recovered" if len(facts.recoveries) == 1 else f"recovered-{nth}"
        made.append(_recover(facts, done, last, output))
        last = output
    return made


def as_text(made: list[list[str]]) -> str:
    """Returns the commands as text for a shell, a line each."""
    return "\n".join(" ".join(shlex.quote("".join(c if c.isprintable() else " " for c in w)) for w in c) for c in made)


def is_expressible(facts: Facts) -> bool:
    """Returns whether the command line can say everything that the plan's config says."""
    return all(_algorithm(role, facts.plan.config.get(role)) is not None for role in TABLES)


def _prune(facts: Facts, output: str) -> list[list[str]]:
    pruned = facts.stored["pruned"]
    again = any(done.get("method") == "reconstruct" for done in facts.recoveries)  # then `pruned` is about that run
    planning, pruning = facts.plan.data, None if again else pruned.get("data")
    start = ["hf-sparsity", "prune", _base(facts)]
    end = [*_reconstruct(pruned, again), "--output", output]
    if not is_expressible(facts):
        return [[*start, "--plan", "config.json", *_data(facts, pruning or planning, _mix(facts)), *end]]
    if planning and pruning and planning != pruning:
        plan = ["hf-sparsity", "plan", _base(facts), *_config(facts), *_data(facts, planning), "--output", "plan.json"]
        return [plan, [*start, "--plan", "plan.json", *_data(facts, pruning, _mix(facts)), *end]]
    return [[*start, *_config(facts), *_data(facts, planning or pruning, _mix(facts)), *end]]


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
    words += ["--refit"] if config.get("refit") is True else []
    return [*words, "--seed", str(config.get("seed", 0))]


def _algorithm(role: str, given: Any) -> str | None:
    """`owl:outlier=7`, with what differs from the defaults; "" for none; None where the command line cannot say it."""
    if given is None:
        return ""
    if not isinstance(given, Mapping) or given.get("name") not in TABLES[role]:
        return None
    defaults = {f.name: f.default for f in fields(TABLES[role][given["name"]])}
    changed = []
    for key, value in given.items():
        known = defaults.get(key)
        if key == "name" or value == (list(known) if isinstance(known, tuple) else known):
            continue
        if not isinstance(value, (bool, int, float, type(None))) and not (
            isinstance(value, str) and value.isidentifier()
        ):
            return None
        changed.append(f"{key}={value}")
    return ":".join([str(given["name"]), *([",".join(changed)] if changed else [])])


def _mix(facts: Facts) -> Mapping[str, Any]:
    """The sources that the model was pruned with, if there were several."""
    return facts.report.sources if facts.report is not None else {}


def _data(facts: Facts, data: Any, mix: Mapping[str, Any] | None = None) -> list[str]:
    """The calibration text's options; its own name is recorded nowhere."""
    if not isinstance(data, Mapping):
        return []
    given = [_source(name, one) for name, one in mix.items()] if mix else [] if facts.is_demo else [TEXT]
    words = ["--calibration", *given] if given else []
    sequences, tokens = data.get("sequences"), data.get("tokens")
    if isinstance(sequences, int) and isinstance(tokens, int) and sequences > 0:
        words += ["--sequences", str(sequences + _apart(facts, mix))]
        words += ["--length", str(tokens // sequences)] if tokens % sequences == 0 else []
    return words


def _source(name: str, one: Any) -> str:
    weight = number(field(one, "weight"), "the report's weight")
    return f"{name if name == SELF else f'{name}={TEXT}'}@{weight:.6g}"


def _apart(facts: Facts, mix: Mapping[str, Any] | None) -> int:
    """Sequences that were given with the others and kept apart."""
    if not mix:
        return 0
    certified = field(facts.stored, "pruned", "certificate") is not None
    whole = [field(facts.plan.chosen, "data", "certificate")]
    counts = whole if certified else [field(one, "sequences") for one in mix.values()]
    return sum(int(number(count, "a number of sequences kept apart")) for count in counts)


def _recover(facts: Facts, done: Mapping[str, Any], model: str, output: str) -> list[str]:
    options = done.get("options")
    options = options if isinstance(options, Mapping) else {}
    words = ["hf-sparsity", "recover", model, "--method", str(done.get("method"))]
    words += ["--teacher", _base(facts)] if done.get("teacher") else []
    if not (facts.is_demo and done.get("teacher")):
        words += ["--data", TEXT]
    steps = done.get("steps") or _steps(done)
    words += ["--steps", str(steps)] if isinstance(steps, int) else []
    for name in TRAINED:
        value = options.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            words += [f"--{name}", str(value)]
    return [*words, "--output", output]


def _steps(done: Mapping[str, Any]) -> int | None:
    """The steps that lead to as many sequences in a reconstruction, with 8 each; None if the text was short of them."""
    sequences = done["data"].get("sequences") if isinstance(done.get("data"), Mapping) else None
    if not isinstance(sequences, int) or not 2 < sequences < 2**40:
        return None
    steps = round((sequences - 1) / SHARE / 8)
    return steps if steps > 0 and math.ceil(steps * 8 * SHARE) + 1 == sequences else None
