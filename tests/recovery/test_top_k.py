"""Distillation by the likeliest tokens: the divergence over k + 1 outcomes, and its gradient."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity.recovery.losses import kl_loss
from hf_sparsity.recovery.top_k import top_k_loss, top_k_of


def pair(seed=0):
    torch.manual_seed(seed)
    return (torch.randn(3, 5, 40) * 3).requires_grad_(), torch.randn(3, 5, 40) * 3, torch.rand(3, 5) > 0.4


@pytest.mark.parametrize("chunk", [10**6, 40])
def test_it_is_the_divergence_over_the_likeliest_tokens_and_another_one(chunk):
    ours, theirs, counted = pair()
    best = top_k_of(theirs, 4, temperature=2.0, chunk=chunk)
    loss = top_k_loss(ours, best, counted, temperature=2.0, chunk=chunk)
    (gradient,) = torch.autograd.grad(loss * 3, ours)
    again = ours.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for i, j in counted.nonzero().tolist():
        p, q = ((x / 2).softmax(-1) for x in (theirs[i, j].double(), again[i, j]))
        chosen = p.argsort(descending=True)[:4]
        other = torch.ones(40, dtype=torch.bool)
        other[chosen] = False
        pairs = [*zip(p[chosen], q[chosen], strict=True), (p[other].sum(), q[other].sum())]
        expected = expected + 4 * sum(a * (a / b).log() for a, b in pairs)
    (wanted,) = torch.autograd.grad(expected * 3, again)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
    assert not gradient[~counted].any()


def test_all_tokens_are_the_full_divergence_and_fewer_are_less():
    ours, theirs, counted = pair(1)
    full = kl_loss(ours, theirs, counted)
    whole = top_k_loss(ours, top_k_of(theirs, 99), counted)
    torch.testing.assert_close(whole, full)
    torch.testing.assert_close(*(torch.autograd.grad(x, ours)[0] for x in (whole, full)))
    some = [float(top_k_loss(ours.detach(), top_k_of(theirs, k), counted)) for k in (1, 4, 16)]
    assert some == sorted(some) and some[0] > 0 and some[-1] < float(full.detach())


def test_shapes_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="do not compare"):
        top_k_loss(torch.zeros(2, 3, 5), top_k_of(torch.zeros(2, 4, 5), 2))
