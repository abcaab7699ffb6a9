"""The verb `refit`: the best weights for zeros that are there already, in a sparse model or a mask of anyone's making."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.output import Output
from ..checkpoint.streamed import open_streamed
from ..config import REFINEMENTS
from ..files import check_finished
from ..model.accepted import check_model
from ..model.fingerprint import model_fingerprint
from ..model.layers import find_layers
from ..model.sparsity import mask_hash
from ..plan import Plan, Report
from ..planning.preparation import Prepared
from .given import Given, SparseWeights, pattern_of, plan_of, plan_of_zeros
from .prune import prune


def refit(
    model: PreTrainedModel,
    sparse: PreTrainedModel | str | os.PathLike[str] | Mapping[str, Tensor],
    batches: Tensor | Iterable[Mapping[str, Any]],
    *,
    refine: str | None = None,
    output_dir: str | os.PathLike[str] | Output | None = None,
    overwrite: bool = False,
    hidden_limit: int | None = None,
    tokenizer: Any = None,
    on_start: Callable[[Prepared], None] | None = None,
) -> Report:
    """Gives the dense model the zeros of a sparse one, and sets the weights that stay to their least-squares optimum.

        dense = AutoModelForCausalLM.from_pretrained("dense")
        refit(dense, "sparse", calibration_batches("c4", tokenizer), output_dir="refitted")

    Every layer's outputs come as near to those of its dense weights as its zeros allow, on the inputs that it gets in
    the refitted model. A row that would not gain keeps the sparse model's weights. With `output_dir` it streams and
    resumes as `prune` does.

    Args:
        model: the dense model that the sparse one was pruned from; it becomes the refitted one, in place.
        sparse: the sparse model, or its folder, dense or packed, of this package or any other; or masks alone: layer ->
            bool `[out, in]`, True = kept, in which layers that are not named stay dense.
        batches: calibration data, see `prepare_batches`.
        refine: `"swaps"`: first exchange kept and removed weights within their rows as far as that lowers the error, see
            `SparsityConfig`; the number of zeros of every row and N:M group stays.
        output_dir, overwrite, hidden_limit, tokenizer, on_start: see `prune`.

    Returns:
        The report; of each layer it has the error of the weights as they were given, and after.

    Raises:
        ValueError: a sparse model without zeros, of other layers or of another dense model, or that was trained after it was
            pruned; missing data; all that `prune` refuses.
        RuntimeError, OSError: see `prune`.
    """
    if refine not in (None, *REFINEMENTS):
        raise ValueError(f"refine={refine!r}: {', '.join(map(repr, REFINEMENTS))} or None is expected")
    if batches is None:
        raise ValueError("a refit needs calibration data: pass batches")
    plan, pruner = _given(sparse, model, refine)
    return prune(
        model,
        plan,
        batches,
        pruner=pruner,
        output_dir=output_dir,
        overwrite=overwrite,
        hidden_limit=hidden_limit,
        tokenizer=tokenizer,
        on_start=on_start,
    )


def _given(sparse: Any, model: PreTrainedModel, refine: str | None) -> tuple[Plan, Given]:
    """The plan, and the pruner that reads what is given."""
    check_model(model)
    if isinstance(sparse, Mapping):
        return _from_masks(sparse, model, refine)
    if isinstance(sparse, (str, os.PathLike)):
        if os.path.isdir(sparse):
            check_finished(sparse)
        sparse = open_streamed(sparse, auto_class=type(model))
    check_model(sparse, "refitted")
    plan, layers = plan_of(sparse, model, refine)
    return plan, Given(str(model_fingerprint(sparse, layers)["weights"]), SparseWeights(layers))


def _from_masks(masks: Mapping[str, Tensor], model: PreTrainedModel, refine: str | None) -> tuple[Plan, Given]:
    """The plan of masks alone, and the pruner that applies them."""
    whole, layers = {}, find_layers(model)
    for name, weight in layers.weights.items():
        mask = masks.get(name, torch.ones(weight.shape, dtype=torch.bool))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != weight.shape:
            raise ValueError(f"the mask of {name} must be a bool tensor of shape {list(weight.shape)}, True = kept")
        whole[name] = mask
    if unknown := sorted(masks.keys() - whole.keys()):
        raise ValueError(f"there are masks for layers that the model does not have, such as {unknown[0]!r}")
    hashes = hashlib.blake2b(digest_size=16)
    for name, mask in whole.items():
        hashes.update(f"{name}{mask_hash(mask)}".encode())
    zeros = {name: int((~mask).sum()) for name, mask in whole.items()}
    sizes = {name: weight.size for name, weight in layers.weights.items()}
    plan = plan_of_zeros(zeros, sizes, {name: pattern_of(mask) for name, mask in whole.items()}, refine)
    plan = replace(plan, model=model_fingerprint(model, layers))
    return plan, Given(hashes.hexdigest(), whole.__getitem__)
