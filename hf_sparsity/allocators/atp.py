"""ATP: a straight line in depth.

Huang et al., ICML 2025, https://arxiv.org/abs/2502.14770.
Checked against the authors' code, wzhuang-xmu/ATP, main.py and search.sh.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..algorithm import LOSS, Allocator, Citation, ModelOracle
from ..core.budget import meet, meet_groups
from ..validation import check_number

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ATP(Allocator):
    """Each block is sparser than the one before by the same `beta`, because errors of early blocks travel furthest.

    Without `beta` every multiple of `step` that keeps all sparsities in [0, 1] is tried, and the calibration loss
    chooses; the authors choose by the perplexity that they report. With a `beta` no data is needed.

    Deliberate differences: 0, which is uniform, takes part and wins ties; where few blocks allow many multiples only
    `trials` of them are tried, evenly spaced; candidates meet the target before they are judged.
    """

    beta: float | None = None  # difference in sparsity of two neighbouring blocks; None: chosen by the loss
    step: float = 0.002  # difference between two slopes that are tried
    trials: int = 10  # largest number of slopes that are tried; the published ones are 9 for 32 blocks at 70 %
    steps: int = 100  # sparsities are judged in steps of 1 / steps

    name = "atp"
    paper = "https://arxiv.org/abs/2502.14770"
    summary = "sparsity rises in a straight line with depth; the slope is chosen on calibration text"
    citation = Citation(
        "huang2025determining",
        "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
        "Weizhong Huang and Yuxin Zhang and Xiawu Zheng and Fei Chao and Rongrong Ji",
        2025,
        "2502.14770",
    )
    needs = frozenset({LOSS})

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_number("atp: beta", self.beta, "[0, 1)", hint=", or None to have it chosen")
        check_number("atp: step", self.step, "(0, 1)")
        check_number("atp: trials", self.trials, "[1, inf)", whole=True)
        check_number("atp: steps", self.steps, "[2, 255]", whole=True)
        object.__setattr__(self, "needs", frozenset({LOSS} if self.beta is None else ()))

    @property
    def grid_steps(self) -> int:
        """`steps`: losses are asked for on this grid of sparsities."""
        return self.steps

    def assign(
        self,
        measures: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        target: float,
        *,
        group: int | None = None,
        probe: ModelOracle | None = None,
    ) -> dict[str, float]:
        """`target + beta * (i - (L - 1) / 2)` for block i of L, counted from 0.

        `ValueError` for a `beta` that leaves [0, 1], and without one when there is no loss to choose by.
        """
        blocks = [list(block) for block in measures if block]
        most = 2 * min(target, 1 - target) / (len(blocks) - 1) if len(blocks) > 1 else 0.0
        if self.beta is not None:
            if self.beta > most + 1e-12 and len(blocks) > 1:
                raise ValueError(
                    f"atp: beta={self.beta} is too steep for {len(blocks)} blocks at sparsity {target}; use at most {most:.4g}"
                )
            return line(blocks, target, self.beta)
        betas = self._choices(most)
        candidates = [_met(line(blocks, target, beta), sizes, target, group) for beta in betas]
        if all(candidate == candidates[0] for candidate in candidates):
            return line(blocks, target, 0.0)
        if probe is None or probe.loss is None:
            raise ValueError("atp chooses its slope by the model's loss: plan with calibration data, or give beta")
        losses = probe.losses(candidates)
        best = min(range(len(betas)), key=lambda i: (losses[i], i))
        logger.info("atp: beta %.4g, loss %.4f; uniform's is %.4f", betas[best], losses[best], losses[0])
        return line(blocks, target, betas[best])

    def _choices(self, most: float) -> list[float]:
        """Returns 0 and up to `trials` multiples of `step`, evenly spaced, none above `most`."""
        count = int(most / self.step + 1e-9)
        apart = -(-count // self.trials) or 1
        return [k * self.step for k in range(0, count + 1, apart)]


def line(blocks: Sequence[Sequence[str]], target: float, beta: float) -> dict[str, float]:
    """Returns the arithmetic progression over blocks whose plain mean is `target`."""
    first = target - beta * (len(blocks) - 1) / 2
    return {name: first + beta * i for i, names in enumerate(blocks) for name in names}


def _met(
    sparsities: Mapping[str, float], sizes: Mapping[str, int], target: float, group: int | None
) -> dict[str, float]:
    """The sparsities as the caller will move them to meet the target."""
    if group is None:
        return meet(sparsities, sizes, target)
    return meet_groups(meet(sparsities, sizes, target, high=1 - 1 / group), sizes, target, group)
