"""Sums of a window against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_sparsity import evaluate_text
from hf_sparsity.evaluation.perplexity import next_token_loss, score_windows, text_windows
from tests.evaluation.models import DOCUMENTS, small, sparse


def test_window_sums_are_the_definitions(tokenizer):
    model, dense = sparse(), small()
    ids = text_windows("\n\n".join(DOCUMENTS), tokenizer, 32)[:3]
    scores = score_windows(model, ids, dense)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    loss, reference = (-x.gather(2, ids[:, 1:, None]).sum((1, 2)) for x in (q, p))
    assert list(scores.predictions) == [31, 31, 31]
    np.testing.assert_allclose(scores.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(scores.reference, reference, rtol=1e-5)
    np.testing.assert_allclose(scores.kl, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(scores.same, (p.argmax(-1) == q.argmax(-1)).sum(1))
    quality = evaluate_text(model, ids, dense)
    assert quality.tokens == 93 and quality.perplexity == pytest.approx(math.exp(loss.sum() / 93), rel=1e-5)
    assert quality.kl == pytest.approx(scores.kl.sum() / 93) and quality.top1 == pytest.approx(scores.same.sum() / 93)
    with torch.no_grad():
        assert next_token_loss({"input_ids": ids}, model(ids).logits) == (
            pytest.approx(float(loss.sum()), rel=1e-5),
            93,
        )
