"""The entry in a sparse model's config that says that it was trained: how, how long, and from which weights on.

`sparsity_config["recovered"]` is the last training; its `previous` is the one before. What is not known is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.fingerprint import versions, weights_fingerprint


class TrainingRecord:
    """A record that grows with a training, in a model's config from its first step on.

    Args:
        model: the model that trains; without a sparsity plan in its config there is nothing to record in.
        method: "trainer", "gradual", "elsa" or "own loop"; of `recover` there are "lora", "full" and "reconstruct", of merges "adapter".
        options: how, as plain JSON types.
        resumed: the record of the run that is gone on with, as a checkpoint has it.
    """

    def __init__(
        self, model: nn.Module, method: str, options: Mapping[str, Any], resumed: Mapping[str, Any] | None = None
    ):
        self._config: Any = model.config
        self.entry: dict[str, Any] = training_entry(model, method, options) | {"steps": 0}
        self.entry["previous"] = self._stored().get("recovered")
        if resumed:
            self.entry |= {key: resumed.get(key) for key in ("model", "previous", "evaluation")}

    def _stored(self) -> Mapping[str, Any]:
        stored = getattr(self._config, "sparsity_config", None)
        return stored if isinstance(stored, Mapping) else {}

    def steps(self, count: int) -> None:
        """Writes into the config that the model was trained for `count` optimizer steps in all."""
        self.entry["steps"] = count
        if count and (stored := self._stored()):
            self._config.sparsity_config = {**stored, "recovered": dict(self.entry)}

    def evaluated(self, loss: Any, step: int) -> None:
        """Remembers a loss on the caller's evaluation data: before the first step, or the last one after it."""
        if isinstance(loss, (int, float)):
            self.entry["evaluation"] = {**self.entry["evaluation"], "after" if step else "before": float(loss)}


def training_entry(model: nn.Module | None, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record with what is known before a training; the rest of its keys are None."""
    return {
        "method": method,
        "options": dict(options),
        "steps": None,
        "tokens": None,
        "data": None,
        "model": None if model is None else weights_fingerprint(model),
        "teacher": None,
        "loss": {"before": None, "after": None},
        "evaluation": {"before": None, "after": None},
        "versions": versions(),
        "previous": None,
    }


def describe(teacher: Any) -> dict[str, Any]:
    """Returns a teacher's name, and a hash of its weights if they are in memory; of stored logits what is known of theirs."""
    if isinstance(record := getattr(teacher, "record", None), Mapping):
        weights = record.get("teacher")
        return {"name": None, "weights": None if weights in (None, "None") else weights}
    offloaded = any(p.device.type == "meta" for p in teacher.parameters())
    return {
        "name": teacher.config._name_or_path or None,
        "weights": None if offloaded else weights_fingerprint(teacher),
    }


class MergeRecord:
    """Says in a model's config that masked adapters are merged into its weights, as long as they are.

    All masked layers of a model share one.
    """

    def __init__(self, model: Any):
        self._config = model.config
        self._merged = 0
        self._before: Any = None

    def merged(self) -> None:
        """A layer was merged; the first one makes the entry."""
        self._merged += 1
        stored = getattr(self._config, "sparsity_config", None)
        if self._merged == 1 and isinstance(stored, Mapping):
            self._before = stored
            self._config.sparsity_config = _with_merge(stored, "SPARSE_LORA")

    def unmerged(self) -> None:
        """A layer was unmerged; the last one takes the entry away."""
        self._merged -= 1
        if self._merged == 0 and self._before is not None:
            self._config.sparsity_config, self._before = self._before, None


def record_merge(model: Any, kinds: str) -> None:
    """Writes into a model's config that adapters of these kinds were merged into its weights."""
    stored = getattr(model.config, "sparsity_config", None)
    if isinstance(stored, Mapping):
        model.config.sparsity_config = _with_merge(stored, kinds)


def _with_merge(stored: Mapping[str, Any], kinds: str) -> dict[str, Any]:
    entry = training_entry(None, "adapter", {"adapters": kinds}) | {"previous": stored.get("recovered")}
    return {**stored, "recovered": entry}
