"""SparsityCallback: train a sparse model in the `Trainer` with every zero held, or make it sparse while it trains.

The order of an optimizer step in transformers 5: gradients are accumulated (and masked by hooks on the parameters,
before anything clips them), `on_pre_optimizer_step`, the optimizer, `on_optimizer_step` (weights masked), the learning
rate, `on_step_end` (masks grow if due, weights masked), then logging, evaluation and saving.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..config import SparsityConfig
from ..core.shards import is_sharded
from ..core.stats import STATS
from ..model.accepted import refuse_quantized
from ..model.fingerprint import weights_fingerprint
from ..model.layers import ModelLayers
from ..model.sparsity import model_plan, planned_layers
from ..plan import Plan
from ..planning.checks import check_plan
from ..planning.make_plan import make_plan
from .gradual import SCHEDULES, GradualPruning, Schedule, gradual_pruner
from .resume import load_weights, resumed_folder, saved_in, saved_state
from .zero_masks import ZeroMasks

logger = logging.getLogger(__name__)

ALLOWED = 0.015  # how far below its plan the sparsity of a layer may be, as when a sparse model is loaded


class SparsityCallback(TrainerCallback, ExportableState):
    """Holds the zeros of a sparse model through training; with a schedule, introduces them.

        Trainer(model, args, train_dataset=data, callbacks=[SparsityCallback()])
        Trainer(dense, args, train_dataset=data, callbacks=[SparsityCallback(config, schedule="cubic", end=0.7)])

    The masks are the zeros of the planned layers when training begins. They are exactly 0 after every optimizer step,
    in evaluation, in every checkpoint and at the end; resuming a checkpoint finds the same masks. The reached
    sparsity is added to the training logs as `"sparsity"`. Works with gradient accumulation and clipping, fp16/bf16
    mixed precision, activation checkpointing, `torch.compile`, DDP and FSDP2; not with DeepSpeed or FSDP1.

    Args:
        config: what to prune to while training; its allocator must need no data (else pass `plan=make_plan(...)`), its
            pruner be `"magnitude"` or `"wanda"`. Needs a `schedule`.
        plan: a plan, its file or its dict. With a `schedule`: what to prune to. Without: the plan whose zeros the
            model already has, if it is not in the model's config.
        schedule: `"cubic"` (fast first, as in Zhu & Gupta) or `"linear"`; None holds the zeros there are.
        start, end: when masks begin to grow and when they are complete: floats are shares of the run in [0, 1],
            ints are optimizer steps.
        interval: optimizer steps between two updates of the masks.

    Raises:
        ValueError: arguments that contradict each other; at the beginning of training also a model without zeros, a
            plan that does not fit it, a quantized or float16 model, or an unsupported way to shard it.
    """

    def __init__(
        self,
        config: SparsityConfig | Mapping[str, Any] | None = None,
        *,
        plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        schedule: str | None = None,
        start: float = 0.0,
        end: float = 0.75,
        interval: int = 10,
    ):
        if config is not None and plan is not None:
            raise ValueError("give config or plan, not both: a plan carries the config it was made with")
        if schedule is None and config is not None:
            raise ValueError("a config is reached over a schedule: pass schedule='cubic' (or prune first, then train)")
        if schedule is not None and config is None and plan is None:
            raise ValueError(f"schedule={schedule!r} needs a config or a plan that says what to prune to")
        if schedule is not None and schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: {' or '.join(map(repr, SCHEDULES))} is expected")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval={interval!r}: a positive number of optimizer steps is expected")
        _steps("start", start, 1000), _steps("end", end, 1000)
        self.config = SparsityConfig.from_dict(config) if isinstance(config, Mapping) else config
        self.plan = _plan(plan)
        self.schedule, self.start, self.end, self.interval = schedule, start, end, interval
        self.held: ZeroMasks | None = None
        self.gradual: GradualPruning | None = None
        self.saved: dict[str, Any] = {}  # what the checkpoint being resumed says, see `state`
        self._batch: Mapping[str, Any] | None = None
        self._model: PreTrainedModel | None = None
        self._watch: Any = None

    @property
    def sparsity(self) -> float:
        """Held zeros over planned weights; 0 before training."""
        return self.held.sparsity if self.held is not None else 0.0

    # ---- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Finds or restores the masks."""
        model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
        _check_supported(model, args)
        self._stop()
        saved = saved_state(state, type(self).__name__) if state.global_step > 0 else {}
        # A checkpoint of a run without this callback has no entry for it, and the Trainer wants one when it saves.
        cast(dict, state.stateful_callbacks).setdefault(type(self).__name__, {})
        if saved:
            load_weights(model, saved, resumed_folder(args, state))
        if self.schedule is None:
            model_layers, plan = self._fit(model, self.plan or model_plan(model))
            self.held = ZeroMasks(model_layers.weights)
            self.gradual = None
        else:
            self._begin_schedule(model, state, saved)
        assert self.held is not None
        if saved:
            self.held.restore(saved)
        elif self.schedule is None:
            _check_zeros(self.held, plan)
        self._model = model
        self.held.apply()
        self.held.hold_gradients()
        self.held.clean(kwargs.get("optimizer"))
        _call_before_trackers(self)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer may have moved dead weights: decay, momentum it had before, mixing of coordinates."""
        if self.held is not None:
            self.held.apply()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Grows the masks when due; masks the weights once more, since other callbacks may have changed them."""
        if self.held is None or self._model is None:
            return
        if self.gradual is not None and self.gradual.schedule.is_due(state.global_step):
            self.gradual.update(state.global_step, self._model, self._batch)
            self.held.clean(kwargs.get("optimizer"))
            if state.global_step == self.gradual.schedule.end:
                # Checkpoints from before were less sparse, so no later one could beat them fairly.
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
                self._record(self._model)
        self._batch = None
        self.held.apply()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the reached sparsity to training logs, for the trackers and for `state.log_history`."""
        if self.held is not None and logs is not None and "loss" in logs:
            logs["sparsity"] = self.sparsity
            state.log_history[-1]["sparsity"] = self.sparsity

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the best model that the Trainer may have loaded, and lets the parameters go."""
        if self.held is None or self._model is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint)
            load_weights(self._model, saved_in(best, type(self).__name__), best)
        self.held.apply()
        if self.gradual is not None and state.global_step < self.gradual.schedule.end:
            logger.warning(
                "training ended at step %d, before the sparsity schedule's end at %d: the model has a sparsity of %.4f, not %.4f",
                state.global_step,
                self.gradual.schedule.end,
                self.sparsity,
                self.gradual.plan.target,
            )
        self._stop()

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`: how this callback was made, and what tells its masks from the weights saved with it."""
        args = {
            "config": self.config.to_dict() if self.config is not None else None,
            "plan": self.plan.to_dict() if self.plan is not None else None,
            **{key: getattr(self, key) for key in ("schedule", "start", "end", "interval")},
        }
        if self.held is None or self._model is None:
            return {"args": args, "attributes": {"saved": self.saved}}
        saved = {"masks": self.held.to_dict(), "weights": weights_fingerprint(self._model)}
        if self.gradual is not None:
            saved |= {"plan": self.gradual.plan.to_dict(), "first": dict(self.gradual.first)}
        return {"args": args, "attributes": {"saved": saved}}

    # ---- the steps of on_train_begin

    def _fit(self, model: PreTrainedModel, plan: Plan | None) -> tuple[ModelLayers, Plan | None]:
        """The layers that are meant, and the plan checked against them."""
        model_layers = planned_layers(model, plan)
        if plan is not None:
            # Without the hash of the weights, which are the dense ones': every pruned model would be warned about.
            check_plan(replace(plan, model={**plan.model, "weights": None}), model, model_layers)
        return model_layers, plan

    def _begin_schedule(self, model: PreTrainedModel, state: TrainerState, saved: Mapping[str, Any]) -> None:
        schedule = Schedule(
            str(self.schedule),
            _steps("start", self.start, state.max_steps),
            _steps("end", self.end, state.max_steps),
            self.interval,
        )
        if not schedule.start < schedule.end <= state.max_steps:
            raise ValueError(
                f"the schedule goes from step {schedule.start} to step {schedule.end} of a run of {state.max_steps} steps; "
                "start < end <= the number of optimizer steps is needed"
            )
        plan = Plan.from_dict(saved["plan"]) if "plan" in saved else self.plan or self._make_plan(model)
        gradual_pruner(plan)
        model_layers, _ = self._fit(model, plan)
        self.held = ZeroMasks(model_layers.weights)
        first = saved.get("first")
        if first is None:
            if state.global_step > schedule.start:
                raise ValueError("this checkpoint was not written with gradual pruning; start a new run to prune it")
            first = _sparsities(self.held)
        self.gradual = GradualPruning(plan, self.held, schedule, first)
        if self.gradual.norms is not None:
            self._watch = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _make_plan(self, model: PreTrainedModel) -> Plan:
        assert self.config is not None
        needs: frozenset[str] = getattr(self.config.allocator, "needs", frozenset())
        if needs & (STATS | {"fisher", "loss"}):
            raise ValueError(
                f"allocator {self.config.allocator.name!r} needs calibration data: pass plan=make_plan(model, config, batches)"
            )
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError("the model is sharded: make the plan before, and pass plan=make_plan(model, config)")
        return make_plan(model, self.config)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # storing the inputs is no part of the model
    def _remember(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if module.training:
            names = ("input_ids",) if args else ()
            self._batch = dict(zip(names, args, strict=False)) | dict(kwargs)

    def _record(self, model: PreTrainedModel) -> None:
        assert self.gradual is not None
        pruned = {"sparsity": self.sparsity, "data": None, "versions": dict(self.gradual.plan.versions)}
        model.config.sparsity_config = self.gradual.plan.to_dict() | {"pruned": pruned}

    def _stop(self) -> None:
        if self.held is not None:
            self.held.release()
        if self._watch is not None:
            self._watch.remove()
        self._watch = self._batch = None


def _plan(given: Any) -> Plan | None:
    if given is None or isinstance(given, Plan):
        return given
    return Plan.from_dict(given) if isinstance(given, Mapping) else Plan.load(given)


def _steps(name: str, given: float, total: int) -> int:
    """A share of the run (float) or a number of steps (int) -> steps; `ValueError` otherwise."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given < 0:
        raise ValueError(f"{name}={given!r}: a share of the run in [0, 1] or an int, optimizer steps, is expected")
    if isinstance(given, int):
        return given
    if not given <= 1:
        raise ValueError(f"{name}={given!r}: as a float it is a share of the run, in [0, 1]; optimizer steps are ints")
    return round(given * total)


def _check_supported(model: Any, args: TrainingArguments) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError(
            "SparsityCallback holds the zeros of weights that train, but in a PeftModel the base is frozen. "
            "Use sparse_lora(model, LoraConfig(...)) without this callback: its adapters keep every zero"
        )
    refuse_quantized(model, "trained")
    if getattr(args, "deepspeed", None):
        raise ValueError("DeepSpeed keeps copies of the weights that are out of reach here; use DDP or FSDP2")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP1 flattens parameters, so that masks do not fit them; use FSDP2 (fsdp_version: 2)")
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]} trains in float16, whose updates underflow without a loss scaler over float32 weights: load the "
            "model with dtype=torch.float32 and fp16=True, or in bfloat16"
        )


def _sparsities(held: ZeroMasks) -> dict[str, float]:
    """Sparsity of each layer that has zeros already."""
    found: dict[str, float] = {}
    for one in held.parameters.values():
        if one.zeros:
            found |= {w.name: float(gone.float().mean()) for w, gone in one.views(one.whole()[1])}
    return {name: sparsity for name, sparsity in found.items() if sparsity}


def _check_zeros(held: ZeroMasks, plan: Plan | None) -> None:
    """`ValueError` for a dense model, or one with fewer zeros than its plan says."""
    if held.sparsity == 0:
        raise ValueError(
            "the model has no zeros to hold: prune it first, or pass SparsityCallback(config, schedule='cubic') to prune "
            "it while it trains"
        )
    if plan is None:
        return
    for name, one in held.parameters.items():
        planned = sum(plan.layers[w.name].sparsity * w.size for w in one.weights) / one.size
        if one.zeros / one.size < planned - ALLOWED:
            raise ValueError(
                f"{name} has a sparsity of {one.zeros / one.size:.4f} where the plan says {planned:.4f}. Was the model "
                "trained without this callback, or merged with an adapter, since it was pruned?"
            )


def _call_before_trackers(callback: TrainerCallback) -> None:
    """Moves the callback to the front, since the trackers that `report_to` adds read the logs first otherwise.

    The Trainer does not hand its callback handler to callbacks; it is the caller of this event.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            position = next((i for i, one in enumerate(handler.callbacks) if one is callback), None)
            flow = next(
                (i for i, one in enumerate(handler.callbacks) if type(one).__name__ == "DefaultFlowCallback"), -1
            )
            if position is not None and position > flow + 1:
                # Moving the running callback forward shifts only callbacks that were already called.
                handler.callbacks.insert(flow + 1, handler.callbacks.pop(position))
            return
        frame = frame.f_back  # type: ignore[assignment]
