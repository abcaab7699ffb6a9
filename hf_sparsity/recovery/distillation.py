"""Distillation: train a sparse model towards the outputs of its dense teacher, not only towards the text.

The losses are functions of tensors; `DistillationTrainer` is the `Trainer` with them. All are sums over predictions, so
that neither padding, nor how a batch is cut into chunks or accumulated from smaller ones, changes the gradient.

The divergence here is another function than evaluation's (`evaluation/divergence.py`): that one gives a number for each
token, clamped where a model cannot predict it; this one is softened by a temperature, and its backward pass needs no
copy of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..model.classes import text_config
from ..model.inference import evaluating
from ..model.offload import input_device

CHUNK = 2**24  # logits that are converted to float32 at a time: 64 MiB a tensor


class _SoftenedDivergence(torch.autograd.Function):
    """The sum of `T² KL(softmax(t / T) ‖ softmax(s / T))` over chosen rows; keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, chunk: int) -> Tensor:
        ctx.save_for_backward(student, teacher, rows)
        ctx.temperature, ctx.chunk = temperature, chunk
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for part in rows.split(chunk):
            ours, theirs = _log_probabilities(student, teacher, part, temperature)
            total += (theirs.exp() * (theirs - ours)).sum()
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        student, teacher, rows = ctx.saved_tensors
        result = torch.zeros_like(student)
        for part in rows.split(ctx.chunk):
            ours, theirs = _log_probabilities(student, teacher, part, ctx.temperature)
            # d/ds of T² KL is T (softmax(s / T) - softmax(t / T)).
            result[part] = ((ours.exp() - theirs.exp()) * (grads[0] * ctx.temperature)).to(result.dtype)
        return result, None, None, None, None


def _log_probabilities(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    theirs = teacher[rows.to(teacher.device)].to(student.device)
    ours, theirs = student[rows].float(), theirs.float()
    return torch.log_softmax(ours / temperature, -1), torch.log_softmax(theirs / temperature, -1)


def kl_loss(
    student: Tensor, teacher: Tensor, counted: Tensor | None = None, *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """Returns the sum of `T² KL(teacher ‖ student)` of softened next-token distributions (Hinton et al. 2015), in nats.

    The factor T² keeps the gradient's size the same whatever the temperature. It is computed in float32 whatever the
    logits' dtype, a few rows at a time in both passes, so that no float32 tensor of the logits' size is made.

    Args:
        student, teacher: logits `[..., vocabulary]`, of any devices; only the student's get a gradient.
        counted: bool `[...]`, True where the prediction counts; all by default.
        temperature: above 0.
        chunk: logits to work on at a time.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of {list(student.shape)} (student) and {list(teacher.shape)} (teacher) do not compare"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: a number above 0 is expected")
    size = student.shape[-1]
    mask = torch.ones(student.shape[:-1], dtype=torch.bool) if counted is None else counted
    rows = mask.reshape(-1).nonzero().reshape(-1).to(student.device)
    flat, theirs = student.reshape(-1, size), teacher.detach().reshape(-1, size)
    result: Tensor = _SoftenedDivergence.apply(flat, theirs, rows, float(temperature), max(1, chunk // size))
    return result


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], counted: Tensor) -> Tensor:
    """Returns SquareHead, the relative error of hidden states (Kurtic et al. 2023, https://arxiv.org/abs/2310.06927).

    The error of a sequence is `Σ (s - t)² / Σ t²` over its counted positions and channels, averaged over the blocks. The
    result is the sum over sequences of error times counted positions. Divided by all counted positions that is the
    paper's `MSE(s, t) / MSE(t, 0)`, but normalised by sequence instead of by batch, so that gradients accumulated over
    parts of a batch equal those of the batch.

    Args:
        student, teacher: hidden states `[sequences, tokens, width]` of each block; only the student's get a gradient.
        counted: bool `[sequences, tokens]`.

    Raises:
        ValueError: numbers of blocks or shapes that differ.
    """
    if len(student) != len(teacher) or any(s.shape != t.shape for s, t in zip(student, teacher, strict=False)):
        raise ValueError(
            "student and teacher differ in the number or the width of their blocks: their hidden states do not compare"
        )
    total = torch.zeros((), dtype=torch.float32, device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        keep = counted.to(ours.device)
        theirs = theirs.detach().to(ours.device).float().masked_fill(~keep[..., None], 0)
        ours = ours.float().masked_fill(~keep[..., None], 0)
        error, size = (ours - theirs).square().sum((1, 2)), theirs.square().sum((1, 2))
        ratio = error / size.clamp_min(torch.finfo(torch.float32).tiny)
        total = total + (ratio * keep.sum(1)).sum().to(total.device)
    return total / len(student)


class DistillationTrainer(Trainer):
    """The `Trainer`, with a loss from a dense teacher: `hard · usual + soft · KL + hidden · SquareHead`, per prediction.

        DistillationTrainer(model, args, train_dataset=..., callbacks=[SparsityCallback()], teacher=dense)

    The teacher only runs forward, in evaluation mode and without gradients: it may be on another device, dispatched by
    accelerate or from `open_streamed`. It is never trained, moved or saved. Predictions whose label is -100 do not
    count. Evaluation reports the usual loss, so that it compares with other runs and chooses the best checkpoint.

    Args:
        *args, **kwargs: the Trainer's.
        teacher: a model of the same vocabulary; for `hidden`, of the same blocks.
        hard, soft, hidden: weights of the usual loss, of `kl_loss` and of `square_head`; not negative.
        temperature: see `kl_loss`.

    Raises:
        ValueError: a teacher that shares weights with the model or has another vocabulary, weights that are negative or
            leave nothing of the teacher; while training also `DataParallel`, data without labels, a model without logits.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        hard: float = 1.0,
        soft: float = 1.0,
        hidden: float = 0.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_teacher(self.model, teacher)
        check_weights(hard, soft, hidden, temperature)
        if self.args.n_gpu > 1:
            raise ValueError(
                "distillation does not go with DataParallel: start one process per device (accelerate launch)"
            )
        self.teacher = teacher
        self.hard, self.soft, self.hidden, self.temperature = hard, soft, hidden, temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the mixed loss while training, the usual one in evaluation; `num_items_in_batch` as for the Trainer."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None:
            raise ValueError("distillation needs labels: they say which predictions count (-100: does not)")
        counted = self._counted(inputs)
        options = {"output_hidden_states": True} if self.hidden else {}
        # Without labels a decoder computes no loss, which is not needed; an encoder-decoder makes its inputs from them.
        bare = (
            dict(inputs)
            if self._has_encoder
            else {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        )
        loss: Any = 0.0
        if self.hard:
            loss, outputs = super().compute_loss(model, {**inputs, **options}, True, num_items_in_batch)
            loss = self.hard * loss
        else:
            outputs = model(**bare, **options)
        if outputs.get("logits") is None:
            raise ValueError(
                "the model returns no logits (is a fused loss such as Liger's on?), so nothing can be distilled"
            )
        theirs = self._ask_teacher(bare, options)
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        extra = self._from_teacher(outputs, theirs, counted) / torch.as_tensor(items).to(outputs["logits"].device)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            extra = extra * (self.accelerator.num_processes // self.get_tp_size())  # as the Trainer does with its loss
        loss = loss + extra
        return (loss, outputs) if return_outputs else loss

    @property
    def _has_encoder(self) -> bool:
        return bool(getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False))

    def _counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """Returns bool `[sequences, tokens]`: the positions of logits whose prediction counts, as the Trainer counts them."""
        if inputs.get("shift_labels") is not None:
            return torch.as_tensor(inputs["shift_labels"] != -100)
        labels: Tensor = inputs["labels"]
        if not self._loss_shifts_labels:
            return labels != -100
        counted = torch.zeros_like(labels, dtype=torch.bool)
        counted[..., :-1] = labels[..., 1:] != -100
        return counted

    def _ask_teacher(self, inputs: Mapping[str, Any], options: Mapping[str, bool]) -> Any:
        device = input_device(self.teacher)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.no_grad(), evaluating(self.teacher):
            return self.teacher(**moved, **options, use_cache=False)

    def _from_teacher(self, ours: Any, theirs: Any, counted: Tensor) -> Tensor:
        """Returns the teacher's part of the loss, summed over predictions."""
        total = torch.zeros((), device=ours["logits"].device)
        if self.soft:
            kl = kl_loss(ours["logits"], theirs["logits"], counted, temperature=self.temperature)
            total = total + self.soft * kl
        if self.hidden:
            error = square_head(_hidden_states(ours), _hidden_states(theirs), counted)
            total = total + self.hidden * error.to(total.device)
        return total


def check_teacher(model: Any, teacher: Any) -> None:
    """Raises ValueError for a teacher that shares weights with the model or has another vocabulary."""
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


def _hidden_states(outputs: Any) -> Sequence[Tensor]:
    """Returns the outputs of the (decoder's) blocks, without the embeddings, which come first."""
    states = outputs.get("hidden_states") or outputs.get("decoder_hidden_states")
    if not states:
        raise ValueError("the model returns no hidden states, so hidden= cannot be used with it")
    result: Sequence[Tensor] = states[1:]
    return result
