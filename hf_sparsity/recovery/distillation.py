"""`DistillationTrainer`: train a sparse model towards the outputs of its dense teacher, not only towards the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from .teacher import Teacher, taught_loss


class DistillationTrainer(Trainer):
    """The `Trainer`, with a loss from a dense teacher: `hard · usual + soft · KL + hidden · SquareHead`, per prediction.

        DistillationTrainer(model, args, train_dataset=..., callbacks=[SparsityCallback()], teacher=dense)

    The teacher only runs forward, in evaluation mode and without gradients: it may be on another device, dispatched by
    accelerate or from `open_streamed`. It is never trained, moved or saved. Predictions whose label is -100 do not
    count. Evaluation reports the usual loss, so that it compares with other runs and chooses the best checkpoint.

    Args:
        *args, **kwargs: the Trainer's.
        teacher: a model of the same vocabulary; for `hidden`, of the same blocks. Or a `Teacher`, with more options: the
            likeliest tokens only, hidden states of chosen blocks, stored logits.
        hard, soft, hidden: weights of the usual loss, of `kl_loss` and of `square_head`; not negative. By default 1, 1, 0.
        temperature: see `kl_loss`; by default 1.

    Raises:
        ValueError: a teacher that shares weights with the model or has another vocabulary, weights that are negative or
            leave nothing of the teacher, weights beside a `Teacher` that has its own; while training also `DataParallel`,
            data without labels, a model without logits.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        hard: float | None = None,
        soft: float | None = None,
        hidden: float | None = None,
        temperature: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        given: dict[str, Any] = {"hard": hard, "soft": soft, "hidden": hidden, "temperature": temperature}
        given = {name: value for name, value in given.items() if value is not None}
        if given and isinstance(teacher, Teacher):
            raise ValueError(
                f"{next(iter(given))}= belongs to the teacher: write Teacher(model, {next(iter(given))}=...)"
            )
        self.teaching = teacher if isinstance(teacher, Teacher) else Teacher(teacher, **given)
        self.teaching.check(self.model)
        if self.args.n_gpu > 1:
            raise ValueError(
                "distillation does not go with DataParallel: start one process per device (accelerate launch)"
            )

    @property
    def teacher(self) -> Any:
        """The model that is learnt from, or the stored logits."""
        return self.teaching.model

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
        usual = super().compute_loss
        loss, outputs = taught_loss(self, self.teaching, usual, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
