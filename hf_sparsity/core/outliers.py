"""Outliers among the scores of a block: how many there are (OWL), and how many survive pruning (MRP)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 24  # weights treated at a time, which bounds memory (64 MiB in float32)


def outlier_percent(scores: Iterable[Tensor], count: int, multiple: float) -> float:
    """Returns `100 * #{v > multiple * mean(v)} / len(v)`, v = all scores of a block, flattened and concatenated in order.

    `scores`: the layers' scores, any shape, `count` entries in all; a generator keeps only one layer's alive
    beside the concatenation. To the bit what the authors compute (luuyin/OWL, lib/prune_all.py,
    check_outlier_mean): the comparison is strict, and the mean is torch's float32 mean of the **whole**
    concatenation, whose rounding a sum over layers would not reproduce.
    """
    flat, end = torch.empty(0), 0
    for part in scores:
        if end == 0:
            flat = torch.empty(count, dtype=torch.float32, device=part.device)
        flat[end : end + part.numel()] = part.reshape(-1)
        end += part.numel()
    if end != count or count == 0:
        raise ValueError(f"outlier_percent got {end} scores where count={count}; it needs at least one")
    threshold = flat.mean() * multiple
    outliers = sum(int((chunk > threshold).sum().item()) for chunk in torch.split(flat, CHUNK))
    return outliers / count * 100


class Survivors:
    """What is left of a block at each of `steps` ascending sparsities, whose masks are nested.

    `scores`: float tensors, compared in float32; ValueError unless all are >= 0 (only then do the thresholds fall
    as pruning proceeds).
    `levels`: uint8, shaped alike: a weight survives steps `0 .. level - 1` (`nested_masks.row_levels`).
    `kept` and `sums` `[steps]`: number of survivors and the sum of their scores, the latter in float64.
    """

    def __init__(self, scores: Sequence[Tensor], levels: Sequence[Tensor], steps: int):
        self.scores, self.levels, self.steps = scores, levels, steps
        self.total = sum(part.numel() for part in scores)
        kept = torch.zeros(steps + 1, dtype=torch.int64)
        sums = torch.zeros(steps + 1, dtype=torch.float64)
        for score, level in self._chunks():
            if not bool((score >= 0).all()):
                raise ValueError("the non-outlier ratio needs scores >= 0 without NaN")
            kept += torch.bincount(level, minlength=steps + 1).cpu()
            sums += torch.bincount(level, weights=score.double(), minlength=steps + 1).cpu()
        # A weight of level n is in steps 0 .. n - 1, so step g holds all levels above g.
        self.kept = kept.flip(0).cumsum(0).flip(0)[1:]
        self.sums = sums.flip(0).cumsum(0).flip(0)[1:]

    def non_outlier_ratios(self, multiple: float, *, dense: bool = False) -> list[float]:
        """Returns the non-outlier ratio at each step: the fraction of weights that are not above a threshold.

        By default the threshold is `multiple` times the mean over all weights, pruned ones counted as 0, and
        the fraction is of all weights (MRP's reading D1). `dense`: the threshold stays that of step 0, which
        must be the dense block, and the fraction is of the survivors (D4).
        """
        sums = self.sums[:1].expand(self.steps) if dense else self.sums
        whole = self.kept if dense else torch.full((self.steps,), self.total)
        # Never rising: cummin only removes the rounding of the cumulative sums.
        thresholds = (multiple * sums / self.total).float().cummin(0).values
        change = torch.zeros(self.steps + 1, dtype=torch.int64)
        for score, level in self._chunks():
            # Few weights exceed even the lowest threshold; only they need to be looked at closely.
            hot = score > thresholds[-1].item()
            score, level = score[hot], level[hot]
            edges = thresholds.flip(0).to(score.device)
            first = self.steps - torch.bucketize(score, edges)  # the step from which on it exceeds the threshold
            seen = first < level
            change += torch.bincount(first[seen], minlength=self.steps + 1).cpu()
            change -= torch.bincount(level[seen], minlength=self.steps + 1).cpu()
        outliers = change.cumsum(0)[:-1]
        return (1 - outliers.double() / whole.clamp(min=1)).tolist()

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for score, level in zip(self.scores, self.levels, strict=True):
            parts = zip(torch.split(score.reshape(-1), CHUNK), torch.split(level.reshape(-1), CHUNK), strict=True)
            yield from ((part.float(), of) for part, of in parts)
