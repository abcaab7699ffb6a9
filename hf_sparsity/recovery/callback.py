"""SparsityCallback: train a sparse model in the `Trainer` with every zero held, or make it sparse while it trains.

The order of an optimizer step in transformers 5: gradients are accumulated (and masked by hooks on the parameters,
before anything clips them), `on_pre_optimizer_step`, the optimizer, `on_optimizer_step` (weights masked), the learning
rate, `on_step_end` (masks grow if due, weights masked), then logging, evaluation and saving.

Other callbacks may stand before or after this one and change weights too. So that evaluations and checkpoints have the
zeros all the same, hooks on the model mask the weights before its first evaluation forward and before its state dict is
taken, see `ZeroMasks.hold`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..config import SparsityConfig
from ..core.shards import is_sharded
from ..core.stats import STATS
from ..model.fingerprint import weights_fingerprint
from ..model.identity import renew_identity
from ..model.sparsity import fit_names, model_plan
from ..plan import Plan
from ..planning.make_plan import make_plan
from ..validation import check_number
from .checks import as_plan, check_has_zeros, check_supported, fitting_layers, sparsities, unwrapped
from .gradual import SCHEDULES, GradualPruning, Schedule, gradual_pruner
from .record import TrainingRecord
from .resume import load_weights, resumed_folder, saved_in, saved_state
from .zero_masks import ZeroMasks

logger = logging.getLogger(__name__)


class SparsityCallback(TrainerCallback, ExportableState):
    """Holds the zeros of a sparse model through training; with a schedule, introduces them.

        Trainer(model, args, train_dataset=data, callbacks=[SparsityCallback()])
        Trainer(dense, args, train_dataset=data, callbacks=[SparsityCallback(config, schedule="cubic", end=0.7)])

    The masks are the zeros of the planned layers when training begins. They are exactly 0 after every optimizer step,
    in evaluation, in every checkpoint and at the end, whatever other callbacks do and wherever in their list they stand;
    resuming a checkpoint finds the same masks. Works with gradient accumulation and clipping, fp16/bf16 mixed precision,
    activation checkpointing, `torch.compile`, DDP, FSDP2 and DeepSpeed's ZeRO-1 and ZeRO-2; not with ZeRO-3 or FSDP1.

    The reached sparsity is added to the training logs as `"sparsity"`. `state.log_history` always has it; trackers have
    it if they stand after this callback in the list, and those that `report_to` adds stand before: for these, use
    `add_to(trainer)` instead of `callbacks=[...]`. What was done is recorded in `sparsity_config["recovered"]`.

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
        check_number("interval", interval, "[1, inf)", whole=True, hint=": optimizer steps")
        _steps("start", start, 1000), _steps("end", end, 1000)
        self.config = SparsityConfig.from_dict(config) if isinstance(config, Mapping) else config
        self.plan = as_plan(plan)
        self.schedule, self.start, self.end, self.interval = schedule, start, end, interval
        self.masks: ZeroMasks | None = None
        self.gradual: GradualPruning | None = None
        self.record: TrainingRecord | None = None
        self.saved: dict[str, Any] = {}  # what the checkpoint being resumed says, see `state`
        self._model: PreTrainedModel | None = None
        self._watch: Any = None  # handle of the hook that remembers inputs

    @property
    def sparsity(self) -> float:
        """Held zeros over planned weights; 0 before training."""
        return self.masks.sparsity if self.masks is not None else 0.0

    def add_to(self, trainer: Any) -> None:
        """Adds the callback to a Trainer in front of its trackers, so that they log the sparsity too."""
        callbacks = trainer.callback_handler.callbacks
        if any(callback is self for callback in callbacks):
            callbacks.remove(self)
        else:
            trainer.add_callback(self)
            callbacks.pop()
        callbacks.insert(0, self)

    # ---- what the Trainer calls

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Warns trainers that load a second copy of the model by its name, as DPO's do for their reference."""
        config = getattr(model, "config", None)
        nameless = not getattr(config, "_name_or_path", "") and getattr(config, "sparsity_config", None)
        if nameless and hasattr(args, "model_init_kwargs"):
            logger.warning(
                "the model was pruned in memory, and no folder has these weights. A trainer that loads a reference model by "
                "name cannot find it: pass ref_model=, or save the model with save_sparse and load it from its folder"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Finds or restores the masks."""
        model, optimizer = unwrapped(model), kwargs.get("optimizer")
        check_supported(model, args, optimizer)
        self._stop()
        name = type(self).__name__
        saved = saved_state(state, name) if state.global_step > 0 else {}
        # A checkpoint of a run without this callback has no entry for it, and the Trainer wants one when it saves.
        cast(dict, state.stateful_callbacks).setdefault(name, {})
        if saved:
            load_weights(model, saved, resumed_folder(args, state))
        if self.schedule is None:
            self._begin_holding(model, saved)
        else:
            self._begin_schedule(model, state, saved)
        assert self.masks is not None
        self._model = model
        options = {"schedule": self.schedule, **vars(self.gradual.schedule)} if self.gradual else {}
        self.record = TrainingRecord(model, "gradual" if self.gradual else "trainer", options, saved.get("record"))
        self.masks.apply()
        self.masks.hold(model, optimizer)
        self.masks.clean(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks what the optimizer moved: by decay, momentum it had before, mixing of coordinates."""
        if self.masks is not None:
            self.masks.apply()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Grows the masks when due; masks the weights once more, since other callbacks may have changed them."""
        if self.masks is None or self._model is None or self.record is None:
            return
        if self.gradual is not None and self.gradual.schedule.is_due(state.global_step):
            self.gradual.update(state.global_step, self._model)
            self.masks.clean(kwargs.get("optimizer"))
            if state.global_step == self.gradual.schedule.end:
                # Checkpoints from before were less sparse, so no later one could beat them fairly.
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            self._store_plan(state.global_step)
        if self.gradual is not None and self.gradual.norms is not None:
            self.gradual.norms.forget()
        self.record.steps(state.global_step)
        self.masks.apply()
        self.masks.weights_may_change()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Records the loss; other callbacks may change weights now."""
        if self.masks is not None and self.record is not None:
            self.record.evaluated((metrics or {}).get("eval_loss"), state.global_step)
            self.masks.weights_may_change()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Other callbacks may change weights now, before an evaluation."""
        if self.masks is not None:
            self.masks.weights_may_change()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the reached sparsity to training logs and to `state.log_history`."""
        if self.masks is not None and logs is not None and "loss" in logs:
            logs["sparsity"] = self.sparsity
            state.log_history[-1]["sparsity"] = self.sparsity

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes over the masks of the best checkpoint if the Trainer loaded it, and lets the parameters go."""
        if self.masks is None or self._model is None or self.record is None:
            return
        step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint:
            step = self._take_over(Path(state.best_model_checkpoint), state.best_global_step or step)
        self.masks.apply()
        self.record.steps(step)
        if self.gradual is not None and step < self.gradual.schedule.end:
            logger.warning(
                "the model is that of step %d, before the sparsity schedule's end at %d: it has a sparsity of %.4f, not %.4f",
                step,
                self.gradual.schedule.end,
                self.sparsity,
                self.gradual.plan.target,
            )
        self._stop()

    def state(self) -> dict[str, Any]:
        """Returns, for `trainer_state.json`, how this callback was made and what identifies its masks."""
        args = {
            "config": self.config.to_dict() if self.config is not None else None,
            "plan": self.plan.to_dict() if self.plan is not None else None,
            **{key: getattr(self, key) for key in ("schedule", "start", "end", "interval")},
        }
        if self.masks is None or self._model is None or self.record is None:
            return {"args": args, "attributes": {"saved": self.saved}}
        saved = {
            "masks": self.masks.to_dict(),
            "weights": weights_fingerprint(self._model),
            "record": self.record.entry,
        }
        if self.gradual is not None:
            saved |= {"plan": self.gradual.plan.to_dict(), "first": dict(self.gradual.first)}
        return {"args": args, "attributes": {"saved": saved}}

    # ---- the steps of on_train_begin and on_train_end

    def _begin_holding(self, model: PreTrainedModel, saved: Mapping[str, Any]) -> None:
        plan = fit_names(self.plan, model) if self.plan else model_plan(model)
        self.masks, self.gradual = ZeroMasks(fitting_layers(model, plan).weights), None
        if saved:
            self.masks.restore(saved)
        else:
            check_has_zeros(self.masks, plan)

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
        plan = fit_names(plan, model)
        gradual_pruner(plan)
        self.masks = ZeroMasks(fitting_layers(model, plan).weights)
        if saved:
            self.masks.restore(saved)
        first = saved.get("first")
        if first is None:
            if state.global_step > schedule.start:
                raise ValueError("this checkpoint was not written with gradual pruning; start a new run to prune it")
            first = sparsities(self.masks)
        self.gradual = GradualPruning(plan, self.masks, schedule, first)
        if self.gradual.norms is not None:
            self._watch = self.gradual.norms.watch(model)

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

    def _take_over(self, best: Path, step: int) -> int:
        """Makes weights, masks and config those of the best checkpoint; returns the step it was written at."""
        assert self.masks is not None and self._model is not None
        saved = saved_in(best, type(self).__name__)
        load_weights(self._model, saved, best)
        if self.gradual is not None and saved:  # the masks of later steps were never judged with these weights
            self.masks.read()
            self.masks.restore(saved)
            self._store_plan(step)
        return step

    def _store_plan(self, step: int) -> None:
        """Writes into the model's config what gradual pruning has reached after this step."""
        assert self.gradual is not None and self._model is not None
        plan = self.gradual.reached(step)
        pruned = {"sparsity": self.sparsity, "data": None, "versions": dict(plan.versions), "gradual": True}
        self._model.config.sparsity_config = plan.to_dict() | {"pruned": pruned}
        renew_identity(self._model, None)

    def _stop(self) -> None:
        if self.masks is not None:
            self.masks.release()
        if self._watch is not None:
            self._watch.remove()
        self._watch = None


def _steps(name: str, value: float, total: int) -> int:
    """Returns optimizer steps for a share of the run (float) or steps (int); raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{name}={value!r}: a share of the run in [0, 1] or an int, optimizer steps, is expected")
    if isinstance(value, int):
        return value
    if not value <= 1:
        raise ValueError(f"{name}={value!r}: as a float it is a share of the run, in [0, 1]; optimizer steps are ints")
    return round(value * total)
