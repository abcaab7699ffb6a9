"""DLP: the authors' mapping, from their code and from the ratios they released; the statistics against plain torch."""

import pytest
import torch

from hf_sparsity.algorithm import NORMS, Layer
from hf_sparsity.allocators.dlp import DLP
from hf_sparsity.core.stats import InputStats

# What ironartisan/DLP, lib/prune.py, get_dlp_ratios makes of these statistics (float32): statistics, alpha, target, sparsities.
AUTHORS = [
    (
        [0.31, 0.52, 0.47, 1.4, 2.75],
        0.15,
        0.7,
        [0.6040983498, 0.6299180388, 0.6237704754, 0.7381147742, 0.9040983617],
    ),
    ([3.0, 1.0, 2.0], 0.04, 0.5, [0.5399999917, 0.4599999785, 0.5]),
]
# Densities released there for Llama-2-7B, ratios/Llama-2-7b-hf_sparsity_0.7_alpha_0.15.json: every fourth block, the last two.
RELEASED = {0: 0.465190351, 4: 0.394651502, 8: 0.358297765, 16: 0.292506486, 24: 0.229313076, 30: 0.165190324}


def layer(name, weight, x):
    stats = InputStats(frozenset({NORMS}))
    stats.add(x, sequences=2)
    return Layer(name, weight, stats=stats)


def block_of(seed, shapes=((8, 16), (24, 16), (16, 24))):
    torch.manual_seed(seed)
    inputs = {width: torch.randn(20, width) * torch.logspace(-1, 1, width) for width in (16, 24)}
    made = {f"{seed}.{i}": (torch.randn(s) * 1.5**seed, inputs[s[1]]) for i, s in enumerate(shapes)}
    return {n: layer(n, w, x) for n, (w, x) in made.items()}, {
        n: w.abs() * (x.square().sum(0) / 2).sqrt() for n, (w, x) in made.items()
    }


def measures_of(values, layers=("q", "up")):
    return [{f"{i}.{layer}": v for layer in layers} for i, v in enumerate(values)]


def sizes_of(measures):
    return {name: 100 * (1 + i % 3) for i, name in enumerate(n for block in measures for n in block)}


@pytest.mark.parametrize(("statistics", "alpha", "target", "expected"), AUTHORS)
def test_golden_mapping(statistics, alpha, target, expected):
    measures = measures_of(statistics)
    found = DLP(spread=alpha).assign(measures, sizes_of(measures), target)
    assert [found[f"{i}.q"] for i in range(len(expected))] == pytest.approx(expected, abs=1e-6)
    assert all(found[f"{i}.q"] == found[f"{i}.up"] for i in range(len(expected)))


def test_golden_released_densities_span_what_the_mapping_says():
    """The released densities are linear in the statistic, so any decreasing line of them must give them back, shifted."""
    assert max(RELEASED.values()) - min(RELEASED.values()) == pytest.approx(2 * 0.15, abs=1e-6)
    measures = measures_of([3 - 5 * d for d in RELEASED.values()])
    found = DLP().assign(measures, sizes_of(measures), 0.7)
    mean = sum(RELEASED.values()) / len(RELEASED)
    assert [found[f"{i}.q"] for i in range(len(RELEASED))] == pytest.approx(
        [1 - d + mean - 0.3 for d in RELEASED.values()], abs=1e-6
    )


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_the_statistic_is_of_all_scores_of_the_block(statistic):
    block, scores = block_of(3)
    flat = torch.cat([s.flatten() for s in scores.values()])
    expected = float(getattr(torch, statistic)(flat))
    found = DLP(statistic=statistic).measure(block, None)
    assert found == pytest.approx(dict.fromkeys(block, expected), rel=1e-6)
    for name, own in DLP(statistic=statistic, per="layer").measure(block, None).items():
        assert own == pytest.approx(float(getattr(torch, statistic)(scores[name])), rel=1e-6)


def test_blocks_that_score_high_become_sparse():
    measures = [DLP().measure(block_of(seed)[0], None) for seed in range(4)]  # each 1.5 times the one before
    found = [*DLP().assign(measures, {}, 0.6).values()][::3]
    assert found == sorted(found) and found[-1] - found[0] == pytest.approx(0.2)  # 0.1 at 60 %


def test_nothing_to_tell_blocks_apart_gives_uniform_and_none_is_dense():
    assert set(DLP().assign(measures_of([2.0, 2.0, 2.0]), {}, 0.7).values()) == {0.7}
    assert set(DLP().assign(measures_of([0.0, 0.0]), {}, 0.7).values()) == {0.7}
    assert min(DLP(spread=0.4).assign(measures_of([0.0, 9.0, 9.0]), {}, 0.3).values()) == 0.01


def test_what_is_refused():
    with pytest.raises(ValueError, match="statistic='mode' is unknown; use 'mean' or 'median'"):
        DLP(statistic="mode")
    with pytest.raises(ValueError, match="spread"):
        DLP(spread=0.5)
    with pytest.raises(ValueError, match="per='row' is unknown"):
        DLP(per="row")
    with pytest.raises(ValueError, match="down: dlp needs the norms"):
        DLP().measure({"down": Layer("down", torch.randn(4, 4))}, None)
    assert DLP().measure({}, None) == {}
