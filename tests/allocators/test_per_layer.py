"""`per="layer"`: a layer treated as a block of its own, by every allocator that has the option."""

import pytest
import torch

from hf_sparsity.algorithm import GRAM, NORMS, Layer, ModelOracle
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.core.budget import mean_sparsity, meet
from hf_sparsity.core.outliers import outlier_percent
from hf_sparsity.core.stats import InputStats
from hf_sparsity.pruners import PRUNERS

OPTIONS = {
    "owl": {"outlier": 3.0},
    "alphapruning": {},
    "farms": {"rows": 16, "ops": 3},
    "mrp": {"refresh": "F0"},
    "dlp": {},
    "lsa": {"columns": 16},
    "fisher": {},
}
WANDA = PRUNERS["wanda"]()


def blocks_of(count=4):
    torch.manual_seed(0)
    blocks = []
    for b in range(count):
        block = {}
        for i, shape in enumerate([(24, 48), (8, 48), (48, 32)]):
            weight = torch.randn(shape) * (torch.randn(shape[0], 1) * (0.2 + 0.1 * ((b + i) % 4))).exp()
            stats = InputStats(frozenset({GRAM, NORMS}))
            stats.add(torch.randn(30, shape[1]) * torch.logspace(-1, 1, shape[1]) * (1 + b), sequences=3)
            layer = Layer(f"{b}.{i}", weight, stats=stats, fisher=float((b + 1) * (i + 2) ** 2))
            layer.scores = WANDA.scores(layer)
            block[layer.name] = layer
        blocks.append(block)
    return blocks


def assigned(name, blocks, per):
    allocator = ALLOCATORS[name](per=per, **OPTIONS[name])
    sizes = {n: layer.weight.numel() for block in blocks for n, layer in block.items()}
    return allocator.assign(
        [allocator.measure(block, WANDA) for block in blocks], sizes, 0.6, probe=ModelOracle()
    ), sizes


def test_every_allocator_that_has_the_option_is_here():
    has = {name for name, cls in ALLOCATORS.items() if "per" in getattr(cls, "__dataclass_fields__", {})}
    assert has == {*OPTIONS, "msp"}  # MSP's own tests have its


@pytest.mark.parametrize("name", OPTIONS)
def test_layers_of_a_block_differ_only_per_layer(name):
    blocks = blocks_of()
    by_block, sizes = assigned(name, blocks, "block")
    for block in blocks:
        assert len({by_block[n] for n in block}) == 1
    by_layer, _ = assigned(name, blocks, "layer")
    assert list(by_layer) == list(sizes)
    assert len(set(by_layer.values())) > len(blocks)
    assert mean_sparsity(meet(by_layer, sizes, 0.6), sizes) == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_of_one_layer_do_not_tell_the_difference(name):
    """The layers, each as a block of its own: what `per="layer"` has to give for the whole blocks."""
    blocks = blocks_of()
    single = [{n: layer} for block in blocks for n, layer in block.items()]
    expected, _ = assigned(name, single, "block")
    assert assigned(name, blocks, "layer")[0] == pytest.approx(expected, abs=1e-12)


def test_owls_outliers_are_above_the_layers_own_mean():
    block = blocks_of(1)[0]
    found = ALLOCATORS["owl"](per="layer", outlier=3.0).measure(block, WANDA)
    for name, layer in block.items():
        score = layer.weight.abs() * layer.stats.norms
        assert found[name] == pytest.approx(100 * float((score > 3 * score.mean()).float().mean()), abs=1e-4)
        assert found[name] == outlier_percent([score], score.numel(), 3.0)


@pytest.mark.parametrize("name", ["owl", "mrp"])
def test_another_granularity_is_refused(name):
    with pytest.raises(ValueError, match="per='row' is unknown; use 'block' or 'layer'"):
        ALLOCATORS[name](per="row")
