"""Fisher: the formula restated, and that it is where MSP's search starts."""

import statistics
from math import log
from random import Random

import pytest
import torch

from hf_sparsity.algorithm import FISHER, Layer
from hf_sparsity.allocators.fisher import Fisher
from hf_sparsity.allocators.msp import Genes

TRACES = [3.0, 8.0, 1.0, 40.0, 6.0]
MEASURES = [{f"{i}.q": f / 4, f"{i}.up": 3 * f / 4} for i, f in enumerate(TRACES)]


def test_the_formula():
    logs = [log(f) for f in TRACES]
    z = [(x - statistics.fmean(logs)) / statistics.pstdev(logs) for x in logs]
    found = Fisher(spread=0.07).assign(MEASURES, {}, 0.6)
    for i, z_ in enumerate(z):
        assert found[f"{i}.q"] == found[f"{i}.up"] == pytest.approx(0.6 - 0.07 * z_, abs=1e-12)


def test_per_layer():
    logs = [log(f) for block in MEASURES for f in block.values()]
    expected = [0.6 - 0.1 * (x - statistics.fmean(logs)) / statistics.pstdev(logs) for x in logs]
    assert [*Fisher(per="layer").assign(MEASURES, {}, 0.6).values()] == pytest.approx(expected, abs=1e-12)


def test_it_is_what_msp_starts_from():
    """0.8 of 8 levels a standard deviation: MSP's noiseless seed, but for its rounding and repair."""
    genes = Genes(sizes=[8] * 5, fisher=TRACES, levels=8, target=0.5, random=Random(0))
    found = [1 - Fisher().assign(MEASURES, {}, 0.5)[f"{i}.q"] for i in range(5)]
    assert [8 * kept for kept in found] == pytest.approx([4 + 0.8 * z for z in genes.z])
    assert genes.seeded(0.8, 0.0) == tuple(round(8 * kept) for kept in found)


def test_scale_does_not_matter_and_a_layer_without_gradient_is_the_least():
    found = Fisher().assign(MEASURES, {}, 0.6)
    scaled = [{name: 1e6 * f for name, f in block.items()} for block in MEASURES]
    assert Fisher().assign(scaled, {}, 0.6) == pytest.approx(found)
    idle = Fisher().assign([*MEASURES, {"5.q": 0.0}], {}, 0.6)
    assert idle["5.q"] == idle["2.q"] == max(idle.values())
    assert set(Fisher().assign([{"a": 0.0}, {"b": 0.0}], {}, 0.6).values()) == {0.6}


def test_what_is_refused():
    assert Fisher().needs == {FISHER}
    for value in (None, float("nan")):
        with pytest.raises(ValueError, match="up: fisher needs the Fisher information"):
            Fisher().measure({"up": Layer("up", torch.zeros(2, 2), fisher=value)}, None)
    with pytest.raises(ValueError, match="spread"):
        Fisher(spread=1.0)
    with pytest.raises(ValueError, match="per="):
        Fisher(per="expert")
