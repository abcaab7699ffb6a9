"""Recipes: for a sparsity, a method of `recover` with every choice made.

The learning rates are those of `recover`, tuned on the embedded model; the teacher and a race's budgets are what helped most on
the toy of `docs/results.md`, "Training to sparsity". The numbers of tokens are what a small model needs to be worth the trouble,
and a larger one deserves more; they have not been tried at these lengths. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .methods import Distillation, RecoveryMethod, Training, TrainToSparsity
from .schedules import Gradual


@dataclass(frozen=True)
class Recipe:
    """What to do for one sparsity: a method with its options, what model it starts from, and the reason in words."""

    method: Training
    starts_dense: bool
    reason: str


def _grown(sparsity: float, tokens: int) -> TrainToSparsity:
    schedule = Gradual(end=0.6, interval=10, scores="magnitude")
    config = {"sparsity": sparsity, "allocator": "race", "pruner": "magnitude"}
    return TrainToSparsity(tokens=tokens, config=config, schedule=schedule, hard=0.5)


RECIPES: dict[int, Recipe] = {
    60: Recipe(Distillation(rank=16, tokens=500_000), False, "pruned by a plan already; adapters that keep the zeros learn from the dense model"),
    70: Recipe(Distillation(rank=16, tokens=1_000_000), False, "pruned by a plan already; adapters that keep the zeros learn from the dense model"),
    80: Recipe(_grown(0.8, 4_000_000), True, "made sparse while it learns from its dense self, by a race's budgets"),
    90: Recipe(_grown(0.9, 8_000_000), True, "made sparse while it learns from its dense self, by a race's budgets"),
}  # fmt: skip


def recipe(sparsity: int, **changes: Any) -> RecoveryMethod:
    """Returns the method for a sparsity in per cent, for `recover`.

        recover("pruned", "corpus.jsonl", recipe(70), output_dir="recovered", teacher="dense")
        recover("dense", "corpus.jsonl", recipe(80, tokens=20_000_000), output_dir="sparse", teacher="dense")

    Recipes 60 and 70 train a model that was pruned before, by a race's plan if possible; 80 and 90 begin with a dense one.

    Args:
        sparsity: 60, 70, 80 or 90.
        **changes: options of the method to change; `steps` takes the place of the recipe's tokens.

    Raises:
        ValueError: another number, or a bad option.
        TypeError: an option that the method does not have.
    """
    if sparsity not in RECIPES:
        raise ValueError(f"recipe {sparsity!r}: one of {', '.join(map(str, RECIPES))} per cent is expected")
    if changes.get("steps") is not None:
        changes = {"tokens": None} | changes
    if changes.get("plan") is not None:
        changes = {"config": None} | changes
    return replace(RECIPES[sparsity].method, **changes)


def in_words(sparsity: int, method: RecoveryMethod) -> str:
    """Returns what a recipe will do, as a few lines: its options are those of `method`, which may differ from the recipe's."""
    chosen, given = RECIPES[sparsity], vars(method)
    start = "a dense model" if chosen.starts_dense else "a pruned model"
    lines = [f"recipe {sparsity}: {start}, {chosen.reason}", f"  method     {method.name}"]
    for name in ("steps", "tokens", "batch", "lr", "rank", "hard", "soft", "temperature", "plan", "config", "schedule"):
        if (value := given.get(name)) is not None:
            lines.append(f"  {name:10} {value.to_dict() if hasattr(value, 'to_dict') else value}")
    if given.get("lr") is None:
        lines.append(f"  lr         {type(method).width_rate:g} / the model's width")  # type: ignore[attr-defined]
    return "\n".join(lines)
