"""Statistics of a layer's inputs, collected while calibration data streams by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

NORMS = "norms"
GRAM = "gram"
SAMPLES = "samples"
STATS = frozenset({NORMS, GRAM, SAMPLES})

TILE = 256  # columns: side of the smallest tile of a Gram matrix; below it a product is no faster
STRIPE = 2 * TILE  # rows of a Gram matrix that are copied at a time to be summed: few enough for the heap to reuse


class InputStats:
    """Running statistics of the tokens that entered one layer (or several fed by the same tensor).

    All are float32 whatever the model's dtype, on the device of the inputs, padding excluded.

    * `tokens`, `sequences`: numbers of those that were seen.
    * `mean_sq` `[in]`, None where `gram` holds the same: mean over **sequences** of the summed squares of each column
      (Wanda's `scaler_row`; locuslab/wanda `lib/layerwrapper.py`, in its order of operations).
    * `gram` `[in, in]`: sum over tokens of `x xᵀ`.
    * `samples` `[k, in]`: the last token of each sequence (TRIM).
    """

    def __init__(self, needs: frozenset[str]):
        self.needs = needs
        self.is_flat = False  # made by `flat`: nothing is known about the inputs
        self.tokens = 0
        self.sequences = 0
        self.mean_sq: Tensor | None = None
        self._gram: Tensor | None = None  # its `_upper` tiles; the others only once somebody asks for `gram`
        self._mirrored = True
        self._samples: list[Tensor] = []

    @classmethod
    def flat(cls, needs: frozenset[str], width: int, norm: float, device: torch.device, tokens: int = 0) -> InputStats:
        """Returns statistics of uncorrelated columns that all have the same `norm`: scores become magnitudes."""
        stats = cls(needs)
        stats.sequences, stats.tokens, stats.is_flat = 1, tokens, True
        if GRAM in needs:
            stats._gram = torch.eye(width, device=device) * norm**2
        else:
            stats.mean_sq = torch.full((width,), norm**2, device=device)
        return stats

    def add(self, x: Tensor, *, sequences: int, last: Tensor | None = None) -> None:
        """Adds tokens `x` `[tokens, in]` of `sequences` sequences; `last`: rows of x that end a sequence."""
        if x.shape[0] == 0:
            return
        x = x.detach()
        wide = x.to(torch.float32)
        seen = self.sequences + sequences
        if GRAM in self.needs:
            if self._gram is None:
                self._gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            for rows, columns in _upper(0, x.shape[1]):
                self._gram[rows, columns].addmm_(wide[:, rows].T, wide[:, columns])
            self._mirrored = False
        else:
            if self.mean_sq is None:
                self.mean_sq = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
            self.mean_sq *= self.sequences / seen
            self.mean_sq += torch.linalg.vector_norm(wide, dim=0) ** 2 / seen
        if SAMPLES in self.needs:
            self._samples.append(wide[-1:].clone() if last is None else wide[last].clone())
        self.tokens += x.shape[0]
        self.sequences = seen

    def close(self, sequences: int) -> None:
        """Rescales `mean_sq` to all `sequences` that passed the block (a routed expert sees only some)."""
        if self.mean_sq is not None and 0 < self.sequences != sequences:
            self.mean_sq *= self.sequences / sequences
        self.sequences = sequences

    @property
    def gram(self) -> Tensor | None:
        """The sum over tokens of `x xᵀ`, `[in, in]` float32; None unless it was asked for and a token came."""
        if self._gram is not None and not self._mirrored:
            for rows, columns in _upper(0, self._gram.shape[0]):
                if rows != columns:
                    self._gram[columns, rows] = self._gram[rows, columns].T
            self._mirrored = True
        return self._gram

    def energy(self, matrix: Tensor) -> float:
        """Returns `‖matrix X‖²` over the tokens X seen, for a `matrix` `[out, in]`: how large an output it makes.

        Computed from the Gram matrix, or else from the column norms, as if the columns were uncorrelated.
        """
        matrix = matrix.to(torch.float32)
        if self._gram is None:
            return (matrix.square() @ self.norms.square()).sum().item() * self.sequences
        tiles = list(_upper(0, self._gram.shape[0]))
        parts = [
            torch.sum((matrix[:, rows] @ self._gram[rows, columns]) * matrix[:, columns]) for rows, columns in tiles
        ]
        values = torch.stack(parts).tolist()  # all at once: a device makes the host wait for each that is asked for
        return sum(part if rows == columns else 2 * part for part, (rows, columns) in zip(values, tiles, strict=True))

    @property
    def norms(self) -> Tensor:
        """The root of the mean over sequences of each column's summed squares (Wanda's ‖x_j‖), `[in]` float32."""
        if self.mean_sq is not None:
            return self.mean_sq.sqrt()
        if self._gram is not None:
            return (self._gram.diagonal() / max(self.sequences, 1)).sqrt()
        raise ValueError("input norms were not collected: the algorithm must name NORMS or GRAM in `needs`")

    @property
    def samples(self) -> Tensor:
        """Samples of the inputs: the last token of each sequence, `[k, in]` float32, in calibration order."""
        if not self._samples:
            raise ValueError("input samples were not collected: the algorithm must name SAMPLES in `needs`")
        return torch.cat(self._samples)

    # What merging the statistics of several processes needs.

    @property
    def width(self) -> int:
        """Number of input columns; 0 if no token came."""
        kept = self._gram if self.mean_sq is None else self.mean_sq
        return 0 if kept is None else kept.shape[-1]

    @property
    def sample_count(self) -> int:
        """The number of samples collected."""
        return sum(map(len, self._samples))

    def replace_samples(self, parts: Sequence[Tensor]) -> None:
        """Takes `parts`, each `[n, in]` float32, in calibration order, in place of the samples collected here."""
        self._samples = list(parts)

    def replace_gram(self, width: int, device: torch.device, total: Callable[[Tensor], Tensor]) -> None:
        """Replaces the Gram matrix by what `total` makes of it, stripe by stripe of rows, in place.

        `width`, `device`: of the matrix, which is zero here if no token came. Most of what is below the diagonal is
        left out; it is not filled before `gram` is asked for.
        """
        if self._gram is None:
            self._gram = torch.zeros(width, width, device=device)
        self._mirrored = False
        for start in range(0, width, STRIPE):
            # A tile on the diagonal is filled below it too, but no tile reaches further back than its own side.
            stripe = self._gram[start : start + STRIPE, max(0, start - TILE) :]
            stripe.copy_(total(stripe))


def _upper(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Yields tiles (rows, columns) of a symmetric matrix on and above its diagonal: little over half of the work."""
    if stop - start <= TILE:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from _upper(start, middle)
    yield from _upper(middle, stop)
    yield slice(start, middle), slice(middle, stop)
