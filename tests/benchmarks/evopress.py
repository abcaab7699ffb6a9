"""The search against EvoPress' schedule: tokens and seconds until the same divergence from the dense model.

    python tests/benchmarks/evopress.py                                  # the embedded model, slices a 16th as long
    python tests/benchmarks/evopress.py --model FOLDER --text FILE --length 256 --scale 4

EvoPress (Sieberling et al., ICML 2025, https://arxiv.org/abs/2410.14649; IST-DASLab/EvoPress, evo_prune_search.py and
example_scripts/prune_search.sh): 400 generations of 64 children from the uniform plan; one to three times one layer gives
what another takes, in steps of equally many weights; the children are judged on 2048 tokens, 8 on 16384, 2 and the parent
on 65536, drawn anew each time. Here with masks from ranks instead of a database, so that only the schedules differ; both
with the slices divided by `--scale`, as this takes hours otherwise. Both choose on the same calibration text; the
divergence that is compared is that of other text, which neither has seen.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparsityConfig, calibration_batches, demo, make_plan
from hf_sparsity.algorithm import Pattern
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.core.budget_grid import Grid, Point
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.race.survey import survey
from hf_sparsity.pruners import Wanda

SLICES, SURVIVORS = (2048, 16384, 65536), (8, 2, 1)
STEP = 1 / 16  # of the median layer: 1M of the 16.8M weights of a q_proj of their 7B models
LEVELS = 8  # steps up and down from uniform
TOGETHER, JUDGED = 2048, 16384  # tokens of a forward pass; and of the text that the results are compared on


class Model:
    """A model that takes on points; divergence from what it said when it was dense."""

    def __init__(self, folder: str, scored: Tensor, target: float):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.layout = find_layers(self.model)
        batches = prepare_batches(self.model, scored)
        _, self.ranks = survey(self.model, self.layout, batches, allocators={}, pruner=Wanda(), pattern=Pattern())
        self.sizes = {n: r.size for n, r in self.ranks.items()}
        zeros, cells = ({n: getattr(r, what) for n, r in self.ranks.items()} for what in ("zeros", "cells"))
        self.grid = Grid(zeros, self.sizes, cells, target)
        self.dense = {n: w.read().clone() for n, w in self.layout.weights.items()}
        self.now: Point = (0,) * len(self.sizes)
        self.tokens = 0

    def take(self, point: Point) -> None:
        """Rewrites the layers that differ."""
        for (name, dense), old, new in zip(self.dense.items(), self.now, point, strict=True):
            if old != new:
                self.layout.weights[name].read().copy_(dense * self.ranks[name].mask(new))
        self.now = point

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Log probabilities."""
        return F.log_softmax(self.model(input_ids=ids, use_cache=False).logits.float(), -1)

    def divergence(self, point: Point, ids: Tensor, dense: Tensor) -> float:
        """KL(dense | masked) per token, in nats."""
        self.take(point)
        self.tokens += ids.numel()
        total = 0.0
        size = max(1, TOGETHER // ids.shape[1])
        for part, said in zip(ids.split(size), dense.split(size), strict=True):
            total += float(F.kl_div(self.logits(part), said, log_target=True, reduction="sum"))
        return total / ids.numel()


def evopress(
    model: Model, pool: Tensor, dense: Tensor, scale: int, generations: int, offspring: int, seed: int
) -> Iterator[Point]:
    """The parent of each generation."""
    rng = random.Random(seed)
    names = list(model.sizes)
    median = sorted(model.sizes.values())[len(names) // 2]
    steps = [STEP * median / model.sizes[name] for name in names]
    target = model.grid.target

    def point(levels: list[int]) -> Point:
        return model.grid.nearest({n: target + k * s for n, k, s in zip(names, levels, steps, strict=True)})

    def possible(level: int, step: float) -> bool:
        return abs(level) <= LEVELS and 0 <= target + level * step < 1

    parent = [0] * len(names)
    for _ in range(generations):
        children: list[list[int]] = []
        while len(children) < offspring:
            child = list(parent)
            for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
                down = rng.choice([i for i, k in enumerate(child) if possible(k - 1, steps[i])])
                up = rng.choice([i for i, k in enumerate(child) if possible(k + 1, steps[i])])
                child[down] -= 1
                child[up] += 1
            if child not in children:
                children.append(child)
        for tokens, kept in zip(SLICES, SURVIVORS, strict=True):
            if kept == SURVIVORS[-1] and parent not in children:
                children.append(parent)
            drawn = rng.sample(range(len(pool)), max(1, tokens // scale // pool.shape[1]))
            values = [model.divergence(point(child), pool[drawn], dense[drawn]) for child in children]
            children = [children[i] for i in sorted(range(len(children)), key=values.__getitem__)[:kept]]
        parent = children[0]
        yield point(parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.PATH)
    parser.add_argument("--text", type=Path, help="the first half calibrates, the second judges (default: the demo's)")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--generations", type=int, default=400)
    parser.add_argument("--offspring", type=int, default=64)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1], help="of EvoPress' tokens")
    parser.add_argument("--candidates", nargs="+", default=[], help="of our race (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = _texts(options.text)
    count = 2 * 524288 // options.scale // options.length  # their calibration text, and as much to score and certify by
    ids, judge = (
        calibration_batches(part, tokenizer, sequences=n, length=options.length, seed=options.seed)
        for part, n in zip(texts, (count, JUDGED // options.length), strict=True)
    )
    statistics, pool = ids[: count * 3 // 8], ids[count * 3 // 8 : count * 3 // 4]
    model = Model(options.model, statistics, options.sparsity)
    dense, truth = model.logits(pool), torch.cat([model.logits(part) for part in judge.split(16)])
    judged: Callable[[Point], float] = lambda point: model.divergence(point, judge, truth)  # noqa: E731
    uniform = model.grid.nearest(dict.fromkeys(model.sizes, options.sparsity))
    print(f"{len(model.sizes)} layers, pool of {pool.numel()} tokens; uniform: KL {judged(uniform):.4f}", flush=True)

    tokens, seconds, curve = 0, 0.0, []
    steps = evopress(model, pool, dense, options.scale, options.generations, options.offspring, options.seed)
    start = time.process_time()
    for generation, point in enumerate(steps, 1):
        seconds += time.process_time() - start
        tokens += model.tokens
        if generation % max(1, options.generations // 20) == 0:
            curve.append((tokens, seconds, judged(point)))
            print(
                f"EvoPress {generation:4d}: {tokens / 1e6:7.2f}M tokens {seconds:7.0f} CPU s  KL {curve[-1][2]:.4f}",
                flush=True,
            )
        model.tokens, start = 0, time.process_time()
    final = curve[-1]

    slices = tuple(s // options.scale for s in SLICES)
    for share in options.shares:
        budget = {"budget": f"{int(share * final[0])} tokens", "candidates": options.candidates}
        allocator = {"name": "search", "slices": slices, **budget}
        fresh = AutoModelForCausalLM.from_pretrained(options.model)
        start = time.process_time()
        plan = make_plan(fresh, SparsityConfig(options.sparsity, allocator=allocator, seed=options.seed), ids)
        spent = time.process_time() - start
        assert plan.chosen is not None
        value = judged(model.grid.nearest({n: layer.sparsity for n, layer in plan.layers.items()}))
        used = plan.chosen["spent"]["tokens"]
        met = next((c for c in curve if c[2] <= value), None)
        print(
            f"ours: {used / 1e6:7.2f}M tokens {spent:7.0f} CPU s  KL {value:.4f}: "
            + (
                f"EvoPress took {met[0] / used:.1f}x the tokens and {met[1] / spent:.1f}x the seconds to be there"
                if met
                else f"EvoPress is not there after {final[0] / used:.1f}x the tokens and {final[1] / spent:.1f}x the seconds"
            ),
            flush=True,
        )


def _texts(file: Path | None) -> tuple[list[str], list[str]]:
    if file is None:
        return tuple([text for _, text in demo.texts(part)] for part in ("calibration", "heldout"))  # type: ignore[return-value]
    text = file.read_text(encoding="utf-8")
    middle = len(text) // 2
    return [text[:middle]], [text[middle:]]


if __name__ == "__main__":
    main()
