"""Sparse matrices for the tests of products."""

from __future__ import annotations

import torch


def sparse(out, width, sparsity, dtype=torch.float32, seed=0):
    """Random zeros everywhere, and some rows without any value or without any zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    weight[torch.rand(out, width, generator=generator) < sparsity] = 0
    weight[out // 2] = 0
    weight[-1] = 1.5
    return weight.to(dtype)


def grouped(out, width, kept, group, dtype=torch.float32, seed=0):
    """Exactly `kept` of each `group` along a row."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).view(-1, group)
    return weight.scatter(1, weight.abs().argsort(1)[:, : group - kept], 0).view(out, width).to(dtype)
