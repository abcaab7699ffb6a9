"""Eigenvalue densities of weights: squared singular values, of the whole matrix or of its windows.

As in haiquanlu/AlphaPruning `lib/esd_utils.py` and HUST-AI-HYZ/FARMS `LLM_Pruning/lib/sampling.py`:
the weight as stored, cast to float32; not centred, not divided by its size.

The authors call a float32 SVD for every window. Here:

* up to `SMALL` on the smaller side the same call, to the bit: it costs hardly more than anything else,
  and a tail fitted near the peak jumps when the smallest eigenvalue moves in its last digits;
* above, the Gram matrix of the smaller side in float64 and its eigenvalues: half the time of the SVD, a
  quarter for wide matrices, and more accurate. (In float32 it would be another third faster, but squaring
  loses the small eigenvalues: alpha was then off by up to 20 % in square matrices, 0.1 % in heavy tails.)
* windows that overlap share it: the next Gram matrix is the last one, plus what enters, minus what leaves;
* on CPU the matrices of a block, and runs of windows, are computed side by side on all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .threads import thread_pool

SMALL = 512  # rows: up to here the float32 SVD of a square takes about as long as the float64 way (26 and 22 ms)


@dataclass(frozen=True)
class Windows:
    """Equal windows `[height, width]` of a matrix, at every pair of a start in `tops` and one in `lefts`."""

    height: int
    width: int
    tops: tuple[int, ...] = (0,)
    lefts: tuple[int, ...] = (0,)


def whole(rows: int, columns: int) -> Windows:
    """Returns the matrix itself as its only window."""
    return Windows(rows, columns)


def sliding(rows: int, columns: int, *, height: int, ratio: float, steps: int) -> Windows:
    """Returns FARMS' windows: `height` rows by `height * ratio` columns, at up to `steps` starts per dimension.

    The starts are deterministic and overlap; because steps are rounded down, the last few rows and
    columns may stay unseen (as published). One deliberate difference: the height is lowered until
    the width fits too. The authors lower it to the smaller side only, so with `ratio > 1` a start
    can become negative and wrap around, and the window is smaller than its siblings elsewhere.
    """
    height = max(1, int(min(height, rows, columns, columns / ratio)))
    width = min(max(1, int(height * ratio)), columns)

    def starts(room: int) -> tuple[int, ...]:
        step = max(1, room // max(1, steps - 1))
        return tuple(i * step for i in range(min(steps, room // step + 1)))

    return Windows(height, width, starts(rows - height), starts(columns - width))


def spectra(weights: Sequence[Tensor], cut: Callable[[int, int], Windows] = whole) -> list[Tensor]:
    """Returns the pooled eigenvalues of each weight's windows: float32, ascending, `[windows * min(height, width)]`.

    `weights`: each `[out, in]`, any float dtype, read as float32. `cut`: (rows, columns) -> `Windows`.
    Rank-deficient weights may give zeros, never negative numbers.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    if not all(bool(w.isfinite().all()) for w in weights):
        raise ValueError("a weight holds NaN or infinity, so it has no eigenvalues; repair the checkpoint")
    # float64 does not exist on every accelerator (mps).
    weights = [w.detach() if w.device.type in ("cpu", "cuda") else w.detach().cpu() for w in weights]
    jobs = [(index, job) for index, w in enumerate(weights) for job in _jobs(w, cut(*w.shape))]
    # Longest first, so that no core ends up alone with a long one.
    jobs.sort(key=lambda job: -job[1].cost)
    on_cpu = all(w.device.type == "cpu" for w in weights)
    pools: list[list[Tensor]] = [[] for _ in weights]
    for index, values in _on_all_cores(lambda job: (job[0], job[1].run()), jobs, cpu=on_cpu):
        pools[index].append(values)
    return [torch.cat(pool).sort().values for pool in pools]


@dataclass(frozen=True)
class _Job:
    """Neighbouring windows `[height, width]` of one band `[height, columns]`, starting at `lefts`."""

    band: Tensor
    width: int
    lefts: tuple[int, ...]

    @property
    def cost(self) -> int:
        return len(self.lefts) * min(self.band.shape[0], self.width) ** 3

    def run(self) -> Tensor:
        """Returns the eigenvalues of all windows, float32, in no order."""
        band = self.band.to(torch.float32)
        if min(band.shape[0], self.width) <= SMALL:
            parts = [band[:, left : left + self.width] for left in self.lefts]
            return torch.cat([torch.linalg.svdvals(part).square() for part in parts])
        values = [torch.linalg.eigvalsh(gram) for gram in self._grams(band)]
        return torch.cat(values).clamp_(min=0).to(torch.float32)

    def _grams(self, band: Tensor) -> Iterator[Tensor]:
        """Yields the float64 Gram matrix of each window's rows (no more than its columns), lower triangle."""
        gram = _gram(band[:, self.lefts[0] : self.lefts[0] + self.width])
        yield gram
        for previous, left in pairwise(self.lefts):
            if 2 * (left - previous) < self.width:
                gram += _gram(band[:, previous + self.width : left + self.width])
                gram -= _gram(band[:, previous:left])
            else:
                gram = _gram(band[:, left : left + self.width])
            yield gram


def _jobs(weight: Tensor, windows: Windows) -> Iterator[_Job]:
    """Cuts a weight into jobs of similar length; windows next to each other stay together."""
    height, width, tops, lefts = windows.height, windows.width, windows.tops, windows.lefts
    # The Gram matrix is that of the smaller side; it slides along the other (if square, along more windows).
    # Small windows keep their orientation: transposing moves the last digits of an SVD.
    turn = width < height or (width == height and len(tops) > len(lefts))
    if turn and min(height, width) > SMALL:
        weight, height, width, tops, lefts = weight.T, width, height, lefts, tops
    parts = 1 if len(tops) > 1 else max(1, torch.get_num_threads())
    length = -(-len(lefts) // parts)
    for top in tops:
        for first in range(0, len(lefts), length):
            yield _Job(weight[top : top + height], width, lefts[first : first + length])


def _gram(x: Tensor) -> Tensor:
    """Returns `x xᵀ` in float64, lower triangle only (the rest is zero): `[n, k]` -> `[n, n]`."""
    n, step = x.shape[0], max(128, -(-x.shape[0] // 8))
    out = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    for part in x.split(4096, dim=1):  # bounds the float64 copy
        wide = part.double()
        for first in range(0, n, step):
            out[first : first + step, : first + step].addmm_(wide[first : first + step], wide[: first + step].T)
    return out


def _on_all_cores(function: Callable, items: Sequence, *, cpu: bool) -> list:
    """Returns `[function(x) for x in items]`; on CPU computed side by side, each with its share of torch's threads.

    LAPACK's reductions spend half their time in memory-bound products that a second thread hardly
    helps, so two matrices on a core each beat one after the other on both.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if not cpu or workers < 2:
        return [function(item) for item in items]
    return list(thread_pool(workers, threads // workers).map(function, items))
