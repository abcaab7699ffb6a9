"""What a model is worth: measured sparsity, perplexity, divergence from the dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..plan import LayerReport, Plan, Report
from .batches import prepare_batches
from .drive import Batch, evaluating
from .layers import Layout, find_layout
from .offload import onload

LOGITS = 2**25  # numbers in one batch's logits while evaluating: 128 MiB in float32


@dataclass(frozen=True)
class Quality:
    """What `evaluate_text` measured over `tokens` predictions.

    `perplexity` per token. Against a reference model: `kl`, the mean divergence KL(reference ‖ model) in
    nats per token, and `top1`, the share of positions where both rank the same token first.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def measure_sparsity(model: PreTrainedModel, ignore: tuple[str, ...] | None = None) -> Report:
    """Counts the zeros of every prunable layer; `planned` and `target` come from the model's plan if it has one.

    `.sparsity` is the whole's, `.layers[name].sparsity` a layer's. `ignore` defaults to the plan's.
    """
    plan = model_plan(model)
    layout = planned_layout(model) if ignore is None else find_layout(model, ignore)
    layers = {}
    for block in layout.blocks:
        with onload(block.module):
            for name, weight in block.weights.items():
                zeros = int((weight.read() == 0).sum())
                planned = plan.layers[name].sparsity if plan and name in plan.layers else zeros / weight.size
                layers[name] = LayerReport(zeros, weight.size, planned)
    report = Report(0.0, layers, layout.skipped)
    return Report(plan.target if plan else report.sparsity, layers, layout.skipped)


def model_plan(model: PreTrainedModel) -> Plan | None:
    """The plan in the model's config, or None; `ValueError` when it is malformed."""
    stored = getattr(model.config, "sparsity_config", None)
    return None if stored is None else Plan.from_dict(stored)


def planned_layout(model: PreTrainedModel) -> Layout:
    """What the model's plan is about; without one, everything that can be pruned."""
    plan = model_plan(model)
    return find_layout(model, tuple(plan.config.get("ignore", ())) if plan is not None else ())


def evaluate_text(model: PreTrainedModel, ids: Tensor, reference: PreTrainedModel | None = None) -> Quality:
    """Perplexity over windows, and divergence from a reference model.

    Args:
        ids: `[windows, tokens]`, each window scored by itself on its `tokens - 1` predictions: the papers'
            protocol when the windows are cut from joined text (see `windows`).
        reference: the dense model, of the same vocabulary.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 2**17)
    size = max(1, LOGITS // (ids.shape[1] * vocabulary))
    batches = prepare_batches(model, [{"input_ids": rows} for rows in ids.split(size)])
    totals = {"loss": 0.0, "reference": 0.0, "kl": 0.0, "same": 0.0}
    tokens = 0
    with evaluating(model), torch.no_grad():
        for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=None, leave=False):
            logits = model(**batch, use_cache=False).logits
            loss, count = next_token_loss(batch, logits)
            totals["loss"] += loss
            tokens += count
            if reference is not None:
                with evaluating(reference):
                    dense = reference(**{k: v.to(reference.device) for k, v in batch.items()}, use_cache=False).logits
                totals["reference"] += next_token_loss(batch, dense)[0]
                kl, same = divergence(dense[:, :-1], logits[:, :-1])
                totals["kl"] += kl
                totals["same"] += same
    quality = Quality(math.exp(totals["loss"] / tokens), tokens)
    if reference is None:
        return quality
    return Quality(
        quality.perplexity,
        tokens,
        math.exp(totals["reference"] / tokens),
        totals["kl"] / tokens,
        totals["same"] / tokens,
    )


def next_token_loss(batch: Batch, logits: Tensor) -> tuple[float, int]:
    """(summed cross-entropy in nats, number of predictions) of a batch's next tokens, padding excluded."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None:
        raise ValueError("a loss needs text: batches with input_ids")
    targets = ids[:, 1:].to(logits.device)
    if "attention_mask" in batch and batch["attention_mask"].shape == ids.shape:
        targets = targets.masked_fill(batch["attention_mask"][:, 1:].to(logits.device) == 0, -100)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100
    )
    return float(losses), int((targets != -100).sum())


def divergence(reference: Tensor, logits: Tensor) -> tuple[float, float]:
    """(summed KL(reference ‖ model) in nats, positions with the same first token), both `[sequences, tokens, vocabulary]`."""
    if reference.shape != logits.shape:
        raise ValueError(
            f"the two models have vocabularies of {reference.shape[-1]} and {logits.shape[-1]}; they cannot be compared"
        )
    dense = F.log_softmax(reference.to(logits.device).float(), dim=-1)
    sparse = F.log_softmax(logits.float(), dim=-1)
    kl = F.kl_div(sparse, dense, log_target=True, reduction="sum")
    return float(kl), float((dense.argmax(-1) == sparse.argmax(-1)).sum())


def windows(text: str, tokenizer: Any, length: int) -> Tensor:
    """Joined text -> non-overlapping windows `[n, length]`, the rest dropped; `ValueError` when there is not one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text or a smaller length"
        )
    return torch.tensor(ids[: count * length]).reshape(count, length)
