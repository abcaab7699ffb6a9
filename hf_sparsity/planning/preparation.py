"""What planning and pruning do before the first block: check memory and disk, take fingerprints, agree among processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.batches import data_fingerprint
from ..checkpoint.journal import Journal
from ..checkpoint.output import Output
from ..checkpoint.plan_file import PlanFile
from ..core.stats import STATS
from ..distributed import Processes, share
from ..model.fingerprint import model_fingerprint, versions
from ..model.inference import Batch
from ..model.layers import ModelLayers
from ..model.precision import compute_dtype, recorded_name
from ..streaming.memory import Estimate, check_room, describe
from ..validation import check_number


@dataclass(frozen=True)
class Prepared:
    """A run that may begin: memory and disk can hold it, and all processes have the same model and data.

    Args:
        model: the model, and `model_layers`, which of its weights are prunable.
        data: calibration batches, those of all processes.
        fingerprints: `{"model": {...}, "data": {...} or None}`.
        estimate: the memory and disk that the run will take.
        processes: those of this launch.
        hidden_limit: bytes of hidden states to keep in memory; None: all.
        output: where the model or the plan will go, if anywhere.
        compute_dtype: the dtype that computes, see `model/precision.py`.
        compute_name: how it is recorded; None where it can only be the model's own, or an earlier version began the run.
    """

    model: PreTrainedModel
    model_layers: ModelLayers
    data: list[Batch]
    fingerprints: Mapping[str, Any]
    estimate: Estimate
    processes: Processes
    hidden_limit: int | None
    output: Output | PlanFile | None
    compute_dtype: torch.dtype
    compute_name: str | None

    @property
    def journal(self) -> Journal | None:
        """The record by which the run goes on after an interruption; None without an output."""
        return self.output.journal if self.output else None

    def begin(self, phase: str, arguments: Mapping[str, Any]) -> None:
        """Begins a phase of the record in the output, or goes on with it.

        Raises:
            ValueError: the record was begun with other arguments.
            OSError: the output cannot be written to.
        """
        if self.output is not None:
            computes = {"compute_dtype": self.compute_name} if self.compute_name else {}
            self.output.begin(phase, {**arguments, **computes, "versions": versions(), **self.fingerprints})

    def describe(self) -> dict[str, Any]:
        """Returns what will be pruned and what stays dense, see `streaming.memory.describe`."""
        return describe(self.model_layers, self.model)


def prepare(
    model: PreTrainedModel,
    model_layers: ModelLayers,
    data: list[Batch],
    *,
    needs: frozenset[str],
    output: Output | PlanFile | None,
    hidden_limit: int | None,
    copies: int = 1,
    computes: str = "auto",
) -> Prepared:
    """Checks that memory and disk can hold a run, and that all processes of the launch have the same model and data.

    Args:
        needs: facts about the layers' inputs that the run will collect, with those of the run that follows it.
        copies: how often the hidden states of the data are held.
        computes: what is asked for, see `SparsityConfig.compute_dtype`.

    Raises:
        ValueError: too little memory or disk space; a process with another model or other data.
    """
    if hidden_limit is not None:
        check_number("hidden_limit", hidden_limit, "[0, inf)", hint=": bytes, or None for all")
    processes = Processes.current()
    earlier = output.earlier_arguments() if output is not None else None
    of_old = (
        earlier is not None and "compute_dtype" not in earlier
    )  # begun by a version that knew no other than "model"
    dtype = compute_dtype(model, "model" if of_old and computes == "auto" else computes)
    name = None if of_old and dtype == model.dtype else recorded_name(model, dtype)
    estimate = check_room(
        model,
        model_layers,
        share(data * copies, processes),
        needs & STATS,
        hidden_limit=hidden_limit,
        output=output.path if isinstance(output, Output) else None,
        computes=dtype,
    )
    fingerprints = {"model": model_fingerprint(model, model_layers), "data": data_fingerprint(data) if data else None}
    processes.agree("model and data", fingerprints)
    processes.agree("precision of computing (set compute_dtype, --compute-dtype)", str(dtype))
    return Prepared(model, model_layers, data, fingerprints, estimate, processes, hidden_limit, output, dtype, name)
