"""The certificate: what a chosen plan gains over uniform, on text that took no part in choosing it or in pruning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.batches import data_fingerprint, prepare_batches
from ..core.bootstrap import interval, paired_bootstrap, resampled_means
from ..model.accepted import check_kind
from ..model.classes import require_next_token
from ..model.inference import Batch, evaluating
from ..model.layers import ModelLayers
from ..model.loading import load_model
from ..model.precision import computing_as
from ..model.sparsity import planned_layers
from ..plan import Plan, read_json
from ..records import Comparison, PlanPair
from .divergence import HIGHEST, DenseReference, PlanScores, compared, joined

RESAMPLES = 1000


def compare(uniform: PlanScores, chosen: PlanScores, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Returns the paired comparison of two plans that were scored on the same sequences."""
    tokens = chosen.tokens
    kl = paired_bootstrap(torch.stack([uniform.kl, chosen.kl], dim=1), tokens, RESAMPLES, confidence, seed)
    losses = torch.stack([uniform.loss, chosen.loss], dim=1)
    drawn = resampled_means(losses, tokens, resamples=RESAMPLES, seed=seed).clamp(max=HIGHEST).exp()
    perplexity = interval(uniform.perplexity - chosen.perplexity, drawn[:, 0] - drawn[:, 1], confidence)
    return Comparison(
        kl=PlanPair(uniform.mean(), chosen.mean(), kl),
        perplexity=PlanPair(uniform.perplexity, chosen.perplexity, perplexity),
        predictions=int(tokens.sum()),
        sequences=len(tokens),
        confidence=confidence,
        resamples=RESAMPLES,
        seed=seed,
    )


def certify(
    dense: PreTrainedModel,
    uniform: PreTrainedModel,
    chosen: PreTrainedModel,
    texts: Tensor | Iterable[Mapping[str, Any]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    compute_dtype: str = "auto",
) -> dict[str, Any]:
    """Compares two finished models, pruned uniformly and by a plan, each against the dense one.

    Args:
        texts: token ids or batches, see `prepare_batches`, that neither pruning nor the choice of the plan has seen.
        compute_dtype: the precision of forward passes, see `SparsityConfig`.

    Returns:
        `Comparison.to_dict()`: kl and perplexity of both, the differences with their intervals, and what they rest on.

    Raises:
        ValueError: bad texts, or a model that does not predict next tokens.
    """
    for model in (dense, uniform, chosen):
        check_kind(model)
        require_next_token(model, "a certificate")
    batches = prepare_batches(dense, texts)
    with computing_as(compute_dtype, dense, uniform, chosen):
        scores = [_against(dense, model, batches) for model in (uniform, chosen)]
    compared = compare(*scores, confidence=confidence, seed=seed)
    return replace(compared, of="models", data=data_fingerprint(batches)).to_dict()


def _against(dense: PreTrainedModel, model: PreTrainedModel, batches: Sequence[Batch]) -> PlanScores:
    """Returns the scores of a second model in memory against the dense one."""
    rows = []
    with evaluating(dense), evaluating(model), torch.no_grad():
        for batch in joined(dense, batches):
            mine = {key: value.to(model.device) for key, value in batch.items()}
            logits = model(**mine, use_cache=False).logits
            rows += compared(batch, dense(**batch, use_cache=False).logits.to(logits.device), logits)
    return PlanScores.of(rows)


class CertificateScore:
    """Scores of a model on the certificate's text: the dense one runs when it is made, the pruned one in `report`."""

    def __init__(self, model: PreTrainedModel, model_layers: ModelLayers, batches: Sequence[Batch]):
        self._reference, self._data = DenseReference(model, model_layers, batches), data_fingerprint(batches)

    def report(self) -> dict[str, Any]:
        """Returns `{"kl", "perplexity", "data"}` of the model as it is now."""
        scores = PlanScores.of(self._reference.rows())
        return {"kl": scores.mean(), "perplexity": scores.perplexity, "data": self._data}


def check(
    folder: str | os.PathLike[str],
    texts: Tensor | Iterable[Mapping[str, Any]],
    *,
    model: PreTrainedModel | None = None,
    dense: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Scores a sparse model's certificate again.

    Args:
        folder: the sparse model's.
        texts: the calibration data that it was pruned with, whose last sequences are the certificate's; or those alone.
        model: loaded from the folder already.
        dense: the model that was pruned; then the divergence is scored too.

    Returns:
        `{"same_text", "recorded": {"kl", "perplexity"}, "now": {"kl" or None, "perplexity"}, "holds", "certificate"}`;
        `holds` is True if the text is the same and perplexity (and KL) are within 1 % of what was recorded.

    Raises:
        ValueError: the model has no certificate, or the texts are too few.
    """
    plan = Plan.load(folder)
    stored = _recorded(Path(folder))
    count = int((plan.chosen or {}).get("data", {}).get("certificate", 0))
    if not count or stored is None:
        raise ValueError(
            f"{folder} has no certificate: it was not pruned by a plan of allocator 'race' or 'search' on the data that "
            "the plan was made with"
        )
    model = model if model is not None else load_model(folder)
    batches = prepare_batches(model, texts)
    if len(batches) < count:
        raise ValueError(f"the certificate is of {count} sequences, and {len(batches)} were given")
    batches = batches[-count:]
    model_layers = planned_layers(model, plan)
    own = str(model.dtype).removeprefix("torch.")
    computed = plan.compute_dtype or own
    choice = "model" if computed == own else computed  # as when it was recorded
    with computing_as(choice, model, dense):
        scores = (
            _against(dense, model, batches)
            if dense is not None
            else PlanScores.of(DenseReference(model, model_layers, batches).rows())
        )
    now = {"kl": scores.mean() if dense is not None else None, "perplexity": scores.perplexity}
    same = data_fingerprint(batches)["sha256"] == stored["data"]["sha256"]
    near = all(v is None or abs(v - stored[k]) <= 0.01 * abs(stored[k]) + 1e-6 for k, v in now.items())
    recorded = {key: stored[key] for key in now}
    return {
        "same_text": same,
        "recorded": recorded,
        "now": now,
        "holds": same and near,
        "certificate": dict(plan.chosen or {}).get("certificate"),
    }


def _recorded(folder: Path) -> dict[str, Any] | None:
    stored = read_json(folder / "config.json").get("sparsity_config", {}).get("pruned", {}).get("certificate")
    return stored if isinstance(stored, dict) and {"kl", "perplexity", "data"} <= stored.keys() else None
