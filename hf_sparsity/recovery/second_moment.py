"""The optimizer's own estimate of how steep the loss is in each weight: Fisher information that training has for free.

Adam keeps a running mean of squared gradients for each weight, which estimates the diagonal of the Fisher information up to
the batch size; `F·w²` is then, up to a factor, what the loss would rise by without the weight (OBD's saliency).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .deepspeed import optimizer_of

NAMES = ("exp_avg_sq", "square_avg")  # Adam's and its kin's; RMSprop's
FLOOR = 1e-6  # of the mean: what a weight that never had a gradient counts as, so that magnitude decides among such


def second_moment(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    """Returns the mean of squared gradients, float32 of the parameter's shape, divided by its mean and never 0.

    None where the optimizer has none in plain form: SGD, Adafactor, moments in 8 bits or sharded, or before its first step.
    """
    state = getattr(optimizer_of(optimizer), "state", None)
    values = (state.get(parameter) or {}) if isinstance(state, Mapping) else {}
    for name in NAMES:
        found = values.get(name)
        if isinstance(found, Tensor) and type(found) in (Tensor, nn.Parameter) and found.shape == parameter.shape:
            moment = found.detach().to(parameter.device, torch.float32)
            mean = moment.mean()
            if not torch.isfinite(mean) or mean <= 0:
                return torch.ones_like(moment)
            return moment / mean + FLOOR
    return None
