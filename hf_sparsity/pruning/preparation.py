"""What `prune` checks before it touches the first block, and what it then has in hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..algorithm import Pruner, RowAllocator
from ..calibration.batches import prepare_batches
from ..calibration.mixture import Mixture
from ..calibration.splits import HeldOut, hold_out, split_of
from ..checkpoint.completion import check_writable
from ..checkpoint.journal import digest
from ..checkpoint.output import Output, open_output
from ..checkpoint.packed_folder import check_worth
from ..config import SparsityConfig
from ..core.stats import NORMS, STATS
from ..distributed import Processes
from ..model.fingerprint import model_fingerprint
from ..model.inference import Batch
from ..model.layers import ModelLayers, find_layers
from ..model.offload import weight_store
from ..model.precision import computing
from ..plan import Plan
from ..planning.checks import check_plan, check_unseen, plan_config
from ..planning.preparation import Prepared, prepare
from ..planning.transfer import made_on_other_weights
from .reconstruction import STREAMS, BlockReconstruction, Reconstruction


@dataclass(frozen=True)
class PruningJob:
    """A plan that fits its model, and all that carrying it out takes.

    Args:
        plan: what is wanted of each layer.
        pruner: decides which weights go.
        rows: decides the sparsity of each row, if anything does.
        needs: facts about the layers' inputs that are used.
        refit: whether the weights that stay are set to their least-squares optimum.
        swaps: whether kept and removed weights are exchanged before.
        run: the model, the batches to prune with, the output.
        all_batches: the calibration batches, with those that judge.
        certificate: the last of them, on which a race promised its gain; the pruned model is scored on it.
        held_out: sequences of a calibration mix, on which the pruned model is compared with the dense one.
        has_travelled: the plan was made on other weights.
        recovery: trains what pruning leaves of each half-block.
    """

    plan: Plan
    pruner: Pruner
    rows: RowAllocator | None
    needs: frozenset[str]
    refit: bool
    swaps: bool
    run: Prepared
    all_batches: list[Batch]
    certificate: list[Batch]
    held_out: HeldOut | None
    has_travelled: bool
    recovery: Reconstruction | None

    @property
    def output(self) -> Output | None:
        """The folder that the sparse model is written to."""
        assert self.run.output is None or isinstance(self.run.output, Output)
        return self.run.output

    def begin(self) -> None:
        """Begins the record of the run in its folder, or goes on with it; see `Prepared.begin` for errors."""
        if self.output is not None:
            arguments = {
                "layout": self.output.layout,
                "plan": digest(self.plan.to_dict()),
                "pruner": self.pruner.to_dict(),
                "reconstruct": self.recovery.options.to_dict() if self.recovery else None,
            }
            self.run.begin("prune", arguments)


def prepare_pruning(
    model: PreTrainedModel,
    plan: Plan,
    batches: Tensor | Iterable[Mapping[str, Any]] | None,
    *,
    pruner: Pruner | None,
    output_dir: str | os.PathLike[str] | Output | None,
    overwrite: bool,
    hidden_limit: int | None,
    reconstruct: BlockReconstruction | None,
) -> PruningJob:
    """Checks the arguments of `prune`, which are described there with the errors, and splits the calibration data."""
    config = plan_config(plan, pruner)
    model_layers = find_layers(model, config.ignore, config.include)
    check_plan(plan, model, model_layers)
    needs = config.pruning_needs & STATS
    recovery = Reconstruction.of(reconstruct, config.seed)
    _check_data_is_there(config, needs, recovery, batches)
    if output_dir is None and weight_store(model) is not None:
        raise ValueError("a streamed model is pruned into a folder: pass output_dir")
    has_travelled = made_on_other_weights(plan, model_fingerprint(model, model_layers))

    prunes_with_data = bool(needs or recovery or plan.chosen)
    looks_at_data = prunes_with_data or has_travelled or isinstance(batches, Mixture)
    all_batches = prepare_batches(model, batches) if looks_at_data and batches is not None else []
    data, certificate = split_of(plan.chosen, all_batches)
    data, held_out = hold_out(batches, data, certificate)
    data = data if prunes_with_data else []
    if recovery:
        recovery.check(len(data))
    _check_resident_weights(model_layers)

    output = open_output(output_dir, overwrite, Processes.current())
    run = prepare(
        model,
        model_layers,
        data,
        needs=needs | {NORMS} if recovery else needs,
        output=output,
        hidden_limit=hidden_limit,
        copies=STREAMS if recovery else 1,
        computes=config.compute_dtype,
    )
    run.processes.agree("the plan", plan.to_dict()["layers"])
    if output is None or not output.goes_on:  # else it was checked before
        with computing(model, run.compute_dtype):
            check_unseen(model, model_layers, data if needs else [], config.allow_unseen)
    if output is not None:
        check_writable(model)
        if output.layout == "bitmask":
            check_worth(plan, model.dtype)
    return PruningJob(
        plan=plan,
        pruner=config.pruner,
        rows=config.row_allocator,
        refit=config.refit,
        swaps=config.refine == "swaps",
        needs=needs,
        run=run,
        all_batches=all_batches,
        certificate=certificate,
        held_out=held_out,
        has_travelled=has_travelled,
        recovery=recovery,
    )


def _check_data_is_there(
    config: SparsityConfig, needs: frozenset[str], recovery: Reconstruction | None, batches: Any
) -> None:
    if batches is not None:
        return
    if needs:
        rows = f" with {config.row_allocator.name!r}" if config.row_allocator else ""
        raise ValueError(f"pruner {config.pruner.name!r}{rows} needs calibration data: pass batches")
    if recovery:
        raise ValueError("reconstruction needs calibration data: pass batches")


def _check_resident_weights(model_layers: ModelLayers) -> None:
    """Raises ValueError for NaN or infinity in the weights that are in memory, before anything is changed."""
    for name, weight in model_layers.weights.items():
        if weight.stored.device.type != "meta" and not torch.isfinite(weight.read()).all():
            raise ValueError(f"{name} has NaN or infinite weights; the checkpoint is damaged")
