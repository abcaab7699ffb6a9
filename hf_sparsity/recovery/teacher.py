"""A teacher and how its lessons are weighed; and the one line that puts it into the loss of any `Trainer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.classes import text_config
from ..model.inference import evaluating
from ..model.offload import input_device
from ..validation import check_number
from .losses import kl_loss, square_head
from .stored_logits import StoredLogits
from .top_k import top_k_loss, top_k_of


class Teacher:
    """A dense model to learn from, for `DistillationTrainer` or `SparsityCallback(teacher=...)`.

    The loss is `hard · usual + soft · KL + hidden · SquareHead`, per prediction. The teacher only runs forward, in
    evaluation mode and without gradients: it may be on another device, dispatched by accelerate or from `open_streamed`.

    Args:
        model: a model of the student's vocabulary; or what `store_logits` returned, or its folder, so that no teacher runs.
        hard, soft, hidden: weights of the usual loss, of the divergence of the next-token distributions, and of the
            relative error of hidden states (`square_head`); not negative.
        temperature: by which both distributions are softened (`kl_loss`); by default 1, or that of the stored logits.
        top_k: compare the teacher's k likeliest tokens and "another one" only, see `top_k_loss`; by default all.
        blocks: the blocks whose hidden states count, as indices; negative ones count from the end. By default all.

    Raises:
        ValueError: weights that are negative or leave nothing of the teacher, bad numbers, or options that stored logits
            do not allow.
    """

    def __init__(
        self,
        model: Any,
        *,
        hard: float = 1.0,
        soft: float = 1.0,
        hidden: float = 0.0,
        temperature: float | None = None,
        top_k: int | None = None,
        blocks: Sequence[int] | None = None,
    ):
        if isinstance(model, (str, os.PathLike)):
            model = StoredLogits(model)
        self.model: Any = model
        stored = model if isinstance(model, StoredLogits) else None
        usual = stored.temperature if stored is not None else 1.0
        self.hard, self.soft, self.hidden = hard, soft, hidden
        self.temperature = usual if temperature is None else temperature
        self.top_k, self.blocks = top_k, None if blocks is None else list(blocks)
        check_weights(self.hard, self.soft, self.hidden, self.temperature)
        check_lessons(top_k, self.blocks, hidden)
        if stored is not None and (hidden or self.temperature != usual or top_k not in (None, stored.top_k)):
            raise ValueError(
                f"stored logits teach with temperature={usual} and top_k={stored.top_k}, and without hidden states"
            )

    @classmethod
    def of(cls, teacher: Any) -> Teacher:
        """Returns a teacher as it is, and a model or stored logits as a teacher with the default weights."""
        return teacher if isinstance(teacher, cls) else cls(teacher)

    def check(self, student: Any) -> None:
        """Raises ValueError for a teacher that shares weights with the student or has another vocabulary."""
        check_teacher(student, self.model)

    def to_dict(self) -> dict[str, Any]:
        """Returns how the lessons are weighed, as plain JSON types; what is not used is left out."""
        values = {name: getattr(self, name) for name in ("hard", "soft", "hidden", "temperature", "top_k", "blocks")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def options(self) -> dict[str, bool]:
        """What the forward of both models is asked for beside logits."""
        return {"output_hidden_states": True} if self.hidden else {}

    def loss(self, outputs: Any, inputs: Mapping[str, Any], counted: Tensor) -> Tensor:
        """Returns the teacher's part of the loss, summed over predictions.

        Args:
            outputs: the student's, with logits, and hidden states if they count.
            inputs: what the student got, without labels.
            counted: bool `[sequences, tokens]`: the positions of logits whose prediction counts.
        """
        logits = outputs["logits"]
        total = torch.zeros((), device=logits.device)
        if isinstance(self.model, StoredLogits):
            return total + self.soft * top_k_loss(logits, self.model(inputs), counted, temperature=self.temperature)
        theirs = self._ask(inputs)
        if self.soft and self.top_k:
            best = top_k_of(theirs["logits"], self.top_k, temperature=self.temperature)
            total = total + self.soft * top_k_loss(logits, best, counted, temperature=self.temperature)
        elif self.soft:
            total = total + self.soft * kl_loss(logits, theirs["logits"], counted, temperature=self.temperature)
        if self.hidden:
            error = square_head(self._states(outputs), self._states(theirs), counted)
            total = total + self.hidden * error.to(total.device)
        return total

    def _ask(self, inputs: Mapping[str, Any]) -> Any:
        device = input_device(self.model)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.no_grad(), evaluating(self.model):
            return self.model(**moved, **self.options, use_cache=False)

    def _states(self, outputs: Any) -> Sequence[Tensor]:
        """Returns the outputs of the chosen (decoder's) blocks, without the embeddings, which come first."""
        states = outputs.get("hidden_states") or outputs.get("decoder_hidden_states")
        if not states:
            raise ValueError("the model returns no hidden states, so hidden= cannot be used with it")
        result: Sequence[Tensor] = states[1:]
        if self.blocks is None:
            return result
        if wrong := [index for index in self.blocks if not -len(result) <= index < len(result)]:
            raise ValueError(
                f"blocks={self.blocks!r}: the model has {len(result)} blocks, and none is number {wrong[0]}"
            )
        return [result[index] for index in self.blocks]


def taught_loss(
    trainer: Any, teacher: Teacher, usual: Callable[..., Any], model: Any, inputs: dict[str, Any], items: Any
) -> tuple[Tensor, Any]:
    """Returns (mixed loss, the student's outputs) of a training batch.

    Args:
        trainer: whose settings say how losses are scaled.
        teacher: what to learn, and how it is weighed.
        usual: the trainer's own `compute_loss`; not called where `hard` is 0. Where it is not the Trainer's (TRL's fuses the
            head with the loss, and the outputs it returns have no gradient), the model runs once more for its logits.
        model: the student, as the trainer wraps it.
        inputs: the batch.
        items: the trainer's `num_items_in_batch`.

    Raises:
        ValueError: data without labels, or a model without logits.
    """
    if inputs.get("labels") is None:
        raise ValueError("distillation needs labels: they say which predictions count (-100: does not)")
    counted = _counted(trainer, inputs)
    bare = dict(inputs)
    if not _has_encoder(teacher.model):
        # Without labels a decoder computes no loss, which is not needed; an encoder-decoder makes its inputs from them.
        bare = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
    loss: Any = 0.0
    if teacher.hard and shares_forward(trainer):
        loss, outputs = usual(model, {**inputs, **teacher.options}, True, items)
    else:
        if teacher.hard:
            loss = usual(model, dict(inputs), False, items)
        outputs = model(**bare, **teacher.options)
    loss = teacher.hard * loss
    if outputs.get("logits") is None:
        raise ValueError(
            "the model returns no logits (is a fused loss such as Liger's on?), so nothing can be distilled"
        )
    number = counted.sum() if items is None else items
    extra = teacher.loss(outputs, bare, counted) / torch.as_tensor(number).to(outputs["logits"].device)
    if items is not None and trainer.args.average_tokens_across_devices:
        extra = extra * (
            trainer.accelerator.num_processes // trainer.get_tp_size()
        )  # as the Trainer does with its loss
    return loss + extra, outputs


def shares_forward(trainer: Any) -> bool:
    """Returns whether the outputs that a trainer returns with its loss are those that the loss came from."""
    kind = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    return kind.__module__.startswith(("transformers.", __package__ + "."))


def teach(trainer: Any, teacher: Teacher) -> None:
    """Puts a teacher into the loss of a trainer: its `compute_loss` is wrapped, on this object only.

    Evaluation keeps the trainer's own loss. For trainers that cannot be replaced by `DistillationTrainer`, such as TRL's.

    Raises:
        ValueError: `DataParallel`, a trainer that has a teacher already, or a teacher that does not fit its model.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError("distillation does not go with DataParallel: start one process per device (accelerate launch)")
    if getattr(trainer.compute_loss, "has_teacher", False) or isinstance(getattr(trainer, "teaching", None), Teacher):
        raise ValueError("this trainer has a teacher already: pass teacher= to it or to the callback, not to both")
    teacher.check(trainer.model)
    usual = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if not model.training:
            return usual(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = taught_loss(trainer, teacher, usual, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    compute_loss.has_teacher = True  # type: ignore[attr-defined]
    trainer.compute_loss = compute_loss


def _has_encoder(teacher: Any) -> bool:
    return bool(getattr(getattr(teacher, "config", None), "is_encoder_decoder", False))


def _counted(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Returns bool `[sequences, tokens]`: the positions of logits whose prediction counts, as the Trainer counts them."""
    if inputs.get("shift_labels") is not None:
        return torch.as_tensor(inputs["shift_labels"] != -100)
    labels: Tensor = inputs["labels"]
    if not trainer._loss_shifts_labels:
        return labels != -100
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[..., :-1] = labels[..., 1:] != -100
    return counted


def check_teacher(model: Any, teacher: Any) -> None:
    """Raises ValueError for a teacher that shares weights with the model or has another vocabulary."""
    if isinstance(teacher, StoredLogits):
        sizes = [getattr(text_config(model.config), "vocab_size", None), teacher.vocabulary]
    else:
        ours = {id(parameter) for parameter in model.parameters()}
        shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in ours]
        if shared:
            raise ValueError(
                f"teacher and model share weights ({shared[0]}), so training would change the teacher; load it anew"
            )
        sizes = [getattr(text_config(m.config), "vocab_size", None) for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the model has a vocabulary of {sizes[0]} and the teacher of {sizes[1]}; they do not compare")


def check_weights(hard: float, soft: float, hidden: float, temperature: float) -> None:
    """Raises ValueError for weights of the losses that are negative or leave nothing of the teacher."""
    if min(hard, soft, hidden) < 0 or not soft + hidden > 0:
        raise ValueError(
            f"hard={hard!r}, soft={soft!r}, hidden={hidden!r}: numbers from 0 are expected, and one of soft and hidden above 0"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: a number above 0 is expected")


def check_lessons(top_k: int | None, blocks: Sequence[int] | None, hidden: float) -> None:
    """Raises ValueError for a number of tokens below 1, or blocks without a weight for their hidden states."""
    if top_k is not None:
        check_number("top_k", top_k, "[1, inf)", whole=True)
    if blocks is None:
        return
    if not blocks or any(isinstance(index, bool) or not isinstance(index, int) for index in blocks):
        raise ValueError(f"blocks={blocks!r}: a list of the numbers of blocks is expected, such as [5, 11, -1]")
    if not hidden:
        raise ValueError("blocks= chooses whose hidden states count, so hidden= above 0 is needed with it")
