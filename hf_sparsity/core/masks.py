"""Masks from scores. Everywhere True = kept, and a higher score means "keep".

Ties are broken the same way everywhere: the lowest column is pruned first, as a stable ascending
sort does (the authors' code leaves ties inside N:M groups to `topk`, which is undefined).
"""

from __future__ import annotations

import torch
from torch import Tensor

COMPARED = 16  # largest group whose order is found by comparing all pairs, which is faster than to sort it
SAMPLE, MARGIN = 4096, 128  # scores by which one of a given rank is found, and how far off the sample may be
TILE = 2**20  # values whose masks are widened at a time: 4 MiB in float32
# Bytes of a value -> the integer of its size.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_(values: Tensor, dead: Tensor) -> Tensor:
    """Sets floating point `values` to 0 where `dead`, a bool tensor of the same shape, is True; in place, and returned.

    `masked_fill_` does it value by value on CPUs. Here the mask's bytes are widened to words that clear all bits of a
    value or none (NaN becomes 0 as well), which is eight times as fast.
    """
    plain = values.device.type == "cpu" and values.shape == dead.shape and not torch.compiler.is_compiling()
    tracked = values.requires_grad and torch.is_grad_enabled()
    if not plain or tracked or not (values.is_contiguous() and dead.is_contiguous()):
        return values.masked_fill_(dead, 0)
    words = values.detach().view(-1).view(INTEGERS[values.element_size()])
    buffer = torch.empty(min(TILE, words.numel()), dtype=words.dtype)
    for part, mask in zip(words.split(TILE), dead.view(-1).view(torch.int8).split(TILE), strict=True):
        part.bitwise_and_(buffer[: mask.numel()].copy_(mask).sub_(1))  # 1, dead: no bit; 0: all bits
    return values


def keep_rows(scores: Tensor, counts: int | Tensor) -> Tensor:
    """Returns the mask that prunes the `counts` lowest scores of each row.

    `scores`: `[rows, columns]`. `counts`: an int, or int64 `[rows]`. The mask is bool `[rows, columns]`
    with exactly `columns - counts` True in each row.

    A selection finds each row's threshold; only rows with ties at the threshold need the order of
    columns. That is several times faster than the stable sort it is equal to.
    """
    rows, columns = scores.shape
    if isinstance(counts, Tensor):
        position = torch.arange(columns, device=scores.device).expand(rows, columns)
        order = scores.argsort(dim=1, stable=True)
        return torch.empty_like(scores, dtype=torch.bool).scatter_(1, order, position >= counts[:, None])
    if counts <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if counts >= columns:
        return torch.zeros_like(scores, dtype=torch.bool)
    if rows == 1:  # a whole matrix
        keep = scores > smallest(scores, counts - 1)
        tied = (torch.count_nonzero(keep) != columns - counts)[None]
    else:
        keep = scores > scores.kthvalue(counts, dim=1, keepdim=True).values
        tied = keep.sum(dim=1) != columns - counts
    if tied.any():
        order = scores[tied].argsort(dim=1, stable=True)
        keep[tied] = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :counts], False)
    return keep


def smallest(scores: Tensor, index: int) -> Tensor:
    """Returns the value at `index` of all scores in ascending order.

    A sorted sample brackets the value, and only what lies between is searched; where a sample misleads, everything is.
    The result is that of a full sort.
    """
    flat = scores.T.reshape(-1)  # of a transposed matrix: no copy
    count = flat.numel()
    if count > 32 * SAMPLE:  # below, a search of everything is as fast
        sample = flat[:: count // SAMPLE].sort().values
        place = index * len(sample) // count
        low, high = sample[max(place - MARGIN, 0)], sample[min(place + MARGIN, len(sample) - 1)]
        middle = flat[(flat >= low) & (flat <= high)]
        rest = index - int(torch.count_nonzero(flat < low))
        if 0 <= rest < len(middle):
            return middle.kthvalue(rest + 1).values
    return flat.kthvalue(index + 1).values


def keep_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Returns the mask that prunes the lowest scores of the whole matrix: every score `<= sorted[int(n * sparsity)]`.

    The threshold is inclusive, as in the authors' code (locuslab/wanda `prune_magnitude`,
    IST-DASLab/sparsegpt): at least `int(n * sparsity) + 1` are pruned, and all ties with the last of them.
    `sparsity == 0` prunes nothing.
    """
    index = int(scores.numel() * sparsity)
    if index <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    # kthvalue is a single-threaded selection on CPU, still far cheaper than the authors' full sort.
    threshold = flat.kthvalue(min(index + 1, flat.numel())).values
    return scores > threshold


def keep_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """Returns the mask that keeps the `kept` highest scores of each `group` consecutive columns.

    `scores`: `[rows, columns]`. Raises ValueError unless `columns` is a multiple of `group`.
    """
    rows, columns = scores.shape
    if columns % group:
        raise ValueError(f"pattern {kept}:{group} does not divide the layer's width {columns}")
    if (kept, group) == (2, 4):
        members = scores.reshape(rows, -1, 2, 2)
        high, low = torch.maximum(members[..., 0], members[..., 1]), torch.minimum(members[..., 0], members[..., 1])
        second = torch.maximum(torch.minimum(high[..., 0], high[..., 1]), torch.maximum(low[..., 0], low[..., 1]))
        keep = scores.reshape(rows, -1, 4) >= second[..., None]
        if torch.count_nonzero(keep) * 2 == keep.numel():  # else there are ties, or NaN
            return keep.reshape(rows, columns)
    return (ranks_in_groups(scores, group) >= group - kept).reshape(rows, columns)


def ranks_in_groups(scores: Tensor, group: int) -> Tensor:
    """Returns the rank of each score inside its group, 0 = lowest, ties by column; uint8 `[rows, columns // group, group]`."""
    grouped = scores.reshape(scores.shape[0], -1, group)
    if group <= COMPARED and not scores.sum().isnan():
        return _ranks_by_comparing(grouped)
    order = grouped.argsort(dim=2, stable=True)
    rank = torch.arange(group, device=scores.device, dtype=torch.uint8).expand(grouped.shape)
    return torch.empty_like(order, dtype=torch.uint8).scatter_(2, order, rank)


def _ranks_by_comparing(grouped: Tensor) -> Tensor:
    """What `ranks_in_groups` returns, by comparing each member of a group with those before it."""
    members = grouped.reshape(-1, grouped.shape[2]).T.contiguous()
    ranks = torch.arange(len(members), dtype=torch.uint8, device=members.device)[:, None].repeat(1, members.shape[1])
    for number in range(1, len(members)):
        larger = (members[:number] > members[number]).to(torch.uint8)
        ranks[:number] += larger
        ranks[number] -= larger.sum(0, dtype=torch.uint8)
    return ranks.T.contiguous().reshape(grouped.shape)
