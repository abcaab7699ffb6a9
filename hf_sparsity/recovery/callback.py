"""SparsityCallback: train a sparse model in the `Trainer` with every zero held, or make it sparse while it trains.

What is here are the events of a Trainer and the record; the masks are `zero_masks.py`, the ways to a plan's sparsity
`gradual.py` and `elsa.py`, the teacher `teacher.py`.

The order of an optimizer step in transformers 5: gradients are accumulated (and masked by hooks on the parameters,
before anything clips them), `on_pre_optimizer_step` (ELSA's pull), the optimizer, `on_optimizer_step` (weights masked), the learning
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
from .checks import as_plan, check_has_zeros, check_supported, fitting_layers, sparsities, unwrapped
from .elsa import ElsaPruning
from .gradual import GradualPruning, Schedule, gradual_pruner
from .record import TrainingRecord, describe
from .resume import load_weights, resumed_folder, saved_in, saved_state
from .schedules import Elsa, Gradual, as_schedule, steps_of
from .teacher import Teacher, teach
from .zero_masks import ZeroMasks

logger = logging.getLogger(__name__)


class SparsityCallback(TrainerCallback, ExportableState):
    """Holds the zeros of a sparse model through training; with a schedule, introduces them.

        Trainer(model, args, train_dataset=data, callbacks=[SparsityCallback()])
        Trainer(dense, args, train_dataset=data, callbacks=[SparsityCallback(config, schedule="cubic", end=0.7)])
        SparsityCallback(plan=plan, schedule=Elsa(penalty=0.02), teacher=dense).add_to(trainer)

    The masks are the zeros of the planned layers when training begins. They are exactly 0 after every optimizer step,
    in evaluation, in every checkpoint and at the end, whatever other callbacks do and wherever in their list they stand;
    resuming a checkpoint finds the same masks. Works with gradient accumulation and clipping, fp16/bf16 mixed precision,
    activation checkpointing, `torch.compile`, DDP, FSDP2 and DeepSpeed's ZeRO-1 and ZeRO-2; not with ZeRO-3 or FSDP1.
    `Elsa`, regrowth, second moments and new budgets on the way need whole weights, so one process or DDP.

    The reached sparsity is added to the training logs as `"sparsity"`. `state.log_history` always has it; trackers have
    it if they stand after this callback in the list, and those that `report_to` adds stand before: for these, use
    `add_to(trainer)` instead of `callbacks=[...]`. What was done is recorded in `sparsity_config["recovered"]`.

    Args:
        config: what to prune to while training; its allocator must need no data (else pass `plan=make_plan(...)`), its
            pruner be `"magnitude"` or `"wanda"`. Needs a `schedule`.
        plan: a plan, its file or its dict. With a `schedule`: what to prune to. Without: the plan whose zeros the
            model already has, if it is not in the model's config.
        schedule: `"cubic"` (fast first, as in Zhu & Gupta) or `"linear"`; a `Gradual` with more choices (scores,
            regrowth, budgets decided anew); an `Elsa`; None holds the zeros there are.
        start, end: when masks begin to grow and when they are complete: floats are shares of the run in [0, 1],
            ints are optimizer steps. Of a schedule given by name only.
        interval: optimizer steps between two updates of the masks; of a schedule given by name only.
        teacher: the dense model to learn from, or a `Teacher` with options; needs `add_to(trainer)`.

    Raises:
        ValueError: arguments that contradict each other; at the beginning of training also a model without zeros, a
            plan that does not fit it, a quantized or float16 model, an unsupported way to shard it, or a teacher that was
            not put into the trainer.
    """

    def __init__(
        self,
        config: SparsityConfig | Mapping[str, Any] | None = None,
        *,
        plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        schedule: str | Gradual | Elsa | Mapping[str, Any] | None = None,
        start: float = 0.0,
        end: float = 0.75,
        interval: int = 10,
        teacher: Any = None,
    ):
        if config is not None and plan is not None:
            raise ValueError("give config or plan, not both: a plan carries the config it was made with")
        if schedule is None and config is not None:
            raise ValueError("a config is reached over a schedule: pass schedule='cubic' (or prune first, then train)")
        if schedule is not None and config is None and plan is None:
            raise ValueError(f"schedule={schedule!r} needs a config or a plan that says what to prune to")
        if not isinstance(schedule, (str, type(None))) and (start, end, interval) != (0.0, 0.75, 10):
            raise ValueError(
                "start, end and interval belong to a schedule given by name; write them into the Gradual or Elsa"
            )
        self.options = as_schedule("cubic" if schedule is None else schedule, start, end, interval)
        self.config = None if config is None else SparsityConfig.of(config)
        self.plan = as_plan(plan)
        self.schedule, self.start, self.end, self.interval = schedule, start, end, interval
        self.teacher = None if teacher is None else Teacher.of(teacher)
        self.masks: ZeroMasks | None = None
        self.gradual: GradualPruning | ElsaPruning | None = None
        self.record: TrainingRecord | None = None
        self.saved: dict[str, Any] = {}  # what the checkpoint being resumed says, see `state`
        self._model: PreTrainedModel | None = None
        self._watch: Any = None  # handle of the hook that remembers inputs
        self._teaches = False  # whether the teacher is in a trainer's loss
        self._in_front = False  # of the trackers

    @property
    def sparsity(self) -> float:
        """Held zeros over planned weights; 0 before training."""
        return self.masks.sparsity if self.masks is not None else 0.0

    def add_to(self, trainer: Any) -> None:
        """Adds the callback to a Trainer in front of its trackers, so that they log the sparsity too.

        With a teacher, the `compute_loss` of this trainer is wrapped, so that it learns from the teacher as well (`teach`).
        """
        if self.teacher is not None and not self._teaches:
            teach(trainer, self.teacher)
            self._teaches = True
        callbacks = trainer.callback_handler.callbacks
        if any(callback is self for callback in callbacks):
            callbacks.remove(self)
        else:
            trainer.add_callback(self)
            callbacks.pop()
        callbacks.insert(0, self)
        self._in_front = True

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
        if self.teacher is not None and not self._teaches:
            raise ValueError(
                "a callback cannot change a loss by itself: put it in by callback.add_to(trainer), not in callbacks=[...]"
            )
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
            self._begin_schedule(model, args, state, saved)
        assert self.masks is not None
        self._model = model
        if args.report_to and not self._in_front:
            logger.warning(
                "%s log before this callback, so they do not see the sparsity: leave it out of callbacks=[...] and call "
                "callback.add_to(trainer) instead",
                " and ".join(map(str, [args.report_to] if isinstance(args.report_to, str) else args.report_to)),
            )
        method = "trainer" if self.gradual is None else "elsa" if isinstance(self.options, Elsa) else "gradual"
        self.record = TrainingRecord(model, method, self._recorded(), saved.get("record"))
        if self.teacher is not None:
            self.record.entry["teacher"] = describe(self.teacher.model)
        self.masks.apply()
        self.masks.hold(model, optimizer)
        self.masks.clean(optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the gradients of pruned weights kept, if some may regrow after this step."""
        if self.gradual is not None:
            self.gradual.before(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pulls the weights towards their sparse copies, with ELSA."""
        if isinstance(self.gradual, ElsaPruning):
            self.gradual.penalise()

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
        if self.gradual is not None and self.gradual.is_due(state.global_step):
            self.gradual.update(state.global_step, self._model, kwargs.get("optimizer"))
            self.masks.clean(kwargs.get("optimizer"))
            if state.global_step == self.gradual.schedule.end:
                # Checkpoints from before were less sparse, so no later one could beat them fairly.
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            if isinstance(self.gradual, GradualPruning) or state.global_step == self.gradual.schedule.end:
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
            if isinstance(self.gradual, ElsaPruning):
                state.log_history[-1]["residual"] = logs["residual"] = self.gradual.residual()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes beside a checkpoint's weights what ELSA needs to go on from it."""
        if isinstance(self.gradual, ElsaPruning) and state.is_world_process_zero:
            self.gradual.save(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

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
            **{key: getattr(self, key) for key in ("start", "end", "interval")},
            "schedule": self.schedule.to_dict() if isinstance(self.schedule, (Gradual, Elsa)) else self.schedule,
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

    def _begin_schedule(
        self, model: PreTrainedModel, args: TrainingArguments, state: TrainerState, saved: Mapping[str, Any]
    ) -> None:
        schedule = self._schedule(args, state.max_steps)
        plan = Plan.from_dict(saved["plan"]) if "plan" in saved else self.plan or self._make_plan(model)
        plan = fit_names(plan, model)
        if isinstance(self.options, Gradual):
            gradual_pruner(plan, self.options.scores)
        self.masks = ZeroMasks(fitting_layers(model, plan).weights)
        if saved:
            self.masks.restore(saved)
        first = saved.get("first")
        if first is None:
            if state.global_step > schedule.start:
                raise ValueError("this checkpoint was not written with gradual pruning; start a new run to prune it")
            first = sparsities(self.masks)
        if isinstance(self.options, Elsa):
            self.gradual = ElsaPruning(plan, self.masks, schedule, self.options)
            if not saved:
                self.gradual.begin()
            elif state.global_step < schedule.end:
                self.gradual.load(resumed_folder(args, state), state.global_step)
            return
        self.gradual = GradualPruning(plan, self.masks, schedule, first, self.options, state.max_steps)
        if self.gradual.norms is not None:
            self._watch = self.gradual.norms.watch(model)

    def _schedule(self, args: TrainingArguments, total: int) -> Schedule:
        """Returns the schedule in optimizer steps of a run of `total`."""
        options = self.options
        assert options is not None  # there is a schedule only with them
        start, end = steps_of(options.start, total), steps_of(options.end, total)
        if not start < end <= total:
            raise ValueError(
                f"the schedule goes from step {start} to step {end} of a run of {total} steps; "
                "start < end <= the number of optimizer steps is needed"
            )
        if isinstance(options, Elsa) and getattr(args, "fp16", False) and not args.max_grad_norm:
            raise ValueError(
                "with fp16 and max_grad_norm=0 gradients stay scaled, so that ELSA's term does not fit them; clip them, or use bf16"
            )
        return Schedule(options.curve, start, end, options.interval)

    def _recorded(self) -> dict[str, Any]:
        """Returns the options of a training for its record, as plain JSON types."""
        options: dict[str, Any] = {}
        if self.gradual is not None:
            options = {"schedule": self.schedule, **vars(self.gradual.schedule)}
        if self.gradual is not None and self.options is not None and not isinstance(self.schedule, str):
            known = {"name", "curve", "start", "end", "interval"}
            more = {key: value for key, value in self.options.to_dict().items() if value and key not in known}
            options |= {"schedule": self.options.name, **more}
        if self.teacher is not None:
            options |= self.teacher.to_dict()
        return options

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
            if isinstance(self.gradual, GradualPruning) or step >= self.gradual.schedule.end:
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
