"""SparseGPT: the authors' weights from the authors' Hessians, exact least squares, and broken inputs."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity.algorithm import GRAM, NORMS, Layer, Pattern
from hf_sparsity.core.masks import smallest
from hf_sparsity.core.stats import InputStats
from hf_sparsity.pruners import sparsegpt
from hf_sparsity.pruners.sparsegpt import SparseGPT, factorize, ranks, solve

SETTINGS = {
    "50": {"sparsity": 0.5},
    "70": {"sparsity": 0.7},
    "2of4": {"pattern": Pattern.parse("2:4")},
    "4of8": {"pattern": Pattern.parse("4:8")},
}


def stats_of(inputs, sequences=4, needs=frozenset({GRAM})):
    stats = InputStats(needs)
    stats.add(inputs, sequences=sequences)
    return stats


def problem(rows=24, width=40, tokens=200):
    """Correlated inputs of uneven size, so that updates and thresholds matter."""
    inputs = torch.randn(tokens, width) * torch.rand(width).add(0.2) + torch.randn(tokens, 3) @ torch.randn(3, width)
    return torch.randn(rows, width), inputs


def assert_equals(new, golden):
    assert torch.equal(new == 0, golden == 0)
    torch.testing.assert_close(new, golden, atol=1e-5, rtol=0)


@pytest.mark.parametrize("setting", ["50", "70", "2of4"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"])
def test_equals_the_authors_on_a_model(goldens, name, setting):
    weight = load_file(goldens / "models/llama-tiny/model.safetensors")[name + ".weight"]
    hessian = load_file(goldens / "llama-tiny/stats/sparsegpt_layer0_hessian.safetensors")[name]
    golden = load_file(goldens / f"llama-tiny/weights/sparsegpt_{setting}.layer0.safetensors")[name]
    (new,) = solve([Layer(name, weight, **SETTINGS[setting])], hessian)
    assert_equals(new, golden)


@pytest.mark.parametrize("key", ["W_s50_b128", "W_s50_b16", "W_s70_b16", "W_2of4_b16", "W_4of8_b16"])
def test_equals_the_authors_beside_dead_columns(goldens, key):
    """From the inputs: the ones put on dead diagonals make the scale of the Hessian matter."""
    golden = load_file(goldens / "edge/sparsegpt_dead_columns.safetensors")
    _, setting, block = key.split("_")
    stats = InputStats(frozenset({GRAM}))
    for sequence in golden["X"]:
        stats.add(sequence, sequences=1)
    layer = Layer("x", golden["W"], stats=stats, **SETTINGS[setting.removeprefix("s")])
    assert_equals(SparseGPT(block_size=int(block[1:])).prune(layer), golden[key])
    assert (golden[key][:, [3, 17, 38]] == 0).all()


@pytest.mark.parametrize("block_size", range(1, 7))
def test_every_step_is_the_exact_least_squares_solution(block_size, monkeypatch):
    """Brute force on 4 x 6: fixing a column leaves the rest at the minimum of ||X w - X w0||, left to right."""
    monkeypatch.setattr(sparsegpt, "STEP", 2)
    weight, inputs = problem(4, 6, 30)
    layer = Layer("x", weight, stats=stats_of(inputs), sparsity=0.5)
    new = SparseGPT(block_size=block_size, damping=1e-9).prune(layer).double()
    pruned, x = new == 0, inputs.double()
    assert 0 < pruned.sum() < pruned.numel()
    for row in range(4):
        current = weight[row].double()
        for j in range(6):
            if not pruned[row, j]:
                continue  # a kept weight is fixed where it stands
            done = torch.cat([current[:j], torch.zeros(1, dtype=torch.float64)])
            rest = x @ weight[row].double() - x[:, : j + 1] @ done
            later = torch.linalg.lstsq(x[:, j + 1 :], rest).solution if j < 5 else current[6:]
            current = torch.cat([done, later])
        torch.testing.assert_close(new[row], current, atol=1e-4, rtol=1e-4)


def test_thresholds_see_the_weights_as_the_columns_before_left_them():
    """Two blocks: the second one's mask is that of the updated weights (brute force), not of the dense ones."""
    weight, inputs = problem(16, 8)
    gram = inputs.T @ inputs
    new = SparseGPT(block_size=4, damping=1e-9).prune(Layer("x", weight, stats=stats_of(inputs), sparsity=0.5))
    current = weight.double()
    upper = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True)
    for begin in (0, 4):
        scores = (current[:, begin : begin + 4] / upper.diagonal()[begin : begin + 4]) ** 2
        pruned = scores <= scores.flatten().sort().values[32]
        for j in range(4):
            column = begin + j
            error = current[:, column] * pruned[:, j] / upper[column, column]
            current[:, column:] -= error[:, None] * upper[column, column:]
            current[pruned[:, j], column] = 0
    assert torch.equal(new == 0, current == 0)
    torch.testing.assert_close(new, current.float(), atol=1e-4, rtol=1e-4)


def test_together_equals_separately():
    weight, inputs = problem(30, 40)
    inputs[:, 5] = 0
    shared, own = stats_of(inputs), stats_of(inputs.flip(1))
    layers = [
        Layer("q", weight[:10], stats=shared, sparsity=0.5),
        Layer("k", weight[10:16], stats=shared, sparsity=0.7),
        Layer("o", weight[:9], stats=own, sparsity=0.6),
        Layer("v", weight[16:20], stats=shared, pattern=Pattern.parse("2:4")),
        Layer("up", weight[20:28], stats=shared, rows=torch.linspace(0.1, 0.8, 8)),
        Layer("dense", weight[28:], stats=shared, sparsity=0.0),
    ]
    pruner = SparseGPT(block_size=16)
    for layer, new in zip(layers, pruner.prune_together(layers), strict=True):
        assert_equals(new, pruner.prune(layer))
    assert torch.equal(pruner.prune(layers[-1]), layers[-1].weight)


@pytest.mark.parametrize("block_size", [7, 16, 128])
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.7])
def test_the_threshold_is_inclusive_in_every_block(sparsity, block_size):
    weight, inputs = problem()
    new = SparseGPT(block_size=block_size).prune(Layer("x", weight, stats=stats_of(inputs), sparsity=sparsity))
    for block in new.split(block_size, dim=1):
        assert (block == 0).sum() == int(block.numel() * sparsity) + 1


def test_rows_lose_their_own_count_spread_over_the_blocks():
    weight, inputs = problem()
    layer = Layer("x", weight, stats=stats_of(inputs), rows=torch.linspace(-0.1, 1.1, 24))
    new = SparseGPT(block_size=16).prune(layer)
    assert torch.equal((new == 0).sum(1), layer.counts)
    assert torch.equal((new[:, :16] == 0).sum(1), layer.counts * 16 // 40)


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "3:5", "19:20"])
def test_patterns_hold_in_every_group_even_where_blocks_do_not_divide(pattern):
    weight, inputs = problem()
    layer = Layer("x", weight, stats=stats_of(inputs), pattern=Pattern.parse(pattern))
    new = SparseGPT(block_size=16).prune(layer)
    kept = (new.reshape(24, -1, layer.pattern.group) != 0).sum(2)
    assert (kept == layer.pattern.kept).all()


@pytest.mark.parametrize("changes", [{"sparsity": 0.6}, {"pattern": Pattern(2, 4)}, {"rows": torch.full((24,), 0.4)}])
def test_pruning_again_changes_nothing(changes):
    weight, inputs = problem()
    inputs[:, 5] = 0
    stats = stats_of(inputs)
    for dtype in (torch.float32, torch.bfloat16):
        once = SparseGPT(block_size=16).prune(Layer("x", weight.to(dtype), stats=stats, **changes))
        assert once.dtype == dtype
        assert torch.equal(SparseGPT(block_size=16).prune(Layer("x", once, stats=stats, **changes)), once)


def test_scores_and_their_mask():
    weight, inputs = problem()
    inputs[:, 5] = 0
    layer = Layer("x", weight, stats=stats_of(inputs), sparsity=0.5)
    damped = layer.stats.gram.double() / 2  # 2 / 4 sequences
    damped[5, 5] = 1
    damped += 0.01 * damped.diagonal().mean() * torch.eye(40)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = weight.abs() / upper.diagonal()
    expected[:, 5] = 0
    scores = SparseGPT().scores(layer)
    assert scores.dtype == torch.float32
    # Ours is the float32 factorization of the authors; how near it comes depends on the number of threads.
    torch.testing.assert_close(scores, expected.float(), atol=0, rtol=1e-3)
    keep = SparseGPT(block_size=16).mask(layer, scores)
    for b in (0, 16, 32):
        block = scores[:, b : b + 16]
        assert torch.equal(keep[:, b : b + 16], block > block.flatten().sort().values[block.numel() // 2])


def test_an_indefinite_hessian_raises_the_damping(caplog):
    weight, _ = problem()
    hessian = torch.full((40, 40), 1.0)
    hessian[0, 0] = 0.2  # eigenvalue of about -0.8
    with caplog.at_level(logging.WARNING):
        (new,) = solve([Layer("block.q", weight, sparsity=0.5)], hessian)
    assert "block.q" in caplog.text and "damping raised" in caplog.text
    assert new.isfinite().all()
    factor, _ = factorize(hessian, damping=0.01)
    shift = (factor @ factor.T - hessian).diagonal()
    torch.testing.assert_close(shift, torch.full((40,), 0.98), atol=1e-4, rtol=0)  # 0.01 of the mean, ten times ten


def test_fewer_tokens_than_inputs():
    weight, inputs = problem(tokens=5)
    assert SparseGPT().prune(Layer("x", weight, stats=stats_of(inputs), sparsity=0.5)).isfinite().all()


@pytest.mark.parametrize("seen", [True, False])
def test_without_inputs_magnitude_decides(seen, caplog):
    weight, inputs = problem()
    stats = stats_of(inputs * 0) if seen else InputStats(frozenset({GRAM}))
    new = SparseGPT().prune(Layer("expert", weight, stats=stats, sparsity=0.5))
    assert "expert" in caplog.text
    torch.testing.assert_close(new, weight * (weight.abs() > weight.abs().flatten().sort().values[480]))


def test_what_cannot_be_used_is_said():
    weight, inputs = problem()
    stats = stats_of(inputs)
    stats.gram[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.7\.q_proj.*NaN"):
        SparseGPT().prune(Layer("layers.7.q_proj", weight, stats=stats, sparsity=0.5))
    with pytest.raises(ValueError, match="GRAM"):
        SparseGPT().prune(Layer("x", weight, stats=stats_of(inputs, needs=frozenset({NORMS})), sparsity=0.5))
    for pattern, words in {"*:8": "resolved", "2:3": "divide"}.items():
        with pytest.raises(ValueError, match=words):
            SparseGPT().prune(Layer("x", weight, stats=stats_of(inputs), pattern=Pattern.parse(pattern)))
    for changes in ({"damping": 0}, {"block_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            SparseGPT(**changes)


@pytest.mark.parametrize("kind", ["even", "ties", "sorted"])
def test_selection_equals_sorting(kind):
    even = torch.rand(500, 300)  # enough for a sample to guide the search
    scores = {"even": even, "ties": (even * 5).floor(), "sorted": torch.arange(150000.0).reshape(500, 300)}[kind]
    expected = scores.flatten().sort().values
    for index in (0, 1, 100, 75000, 149998, 149999):
        assert smallest(scores, index) == expected[index]
    few, expected = scores[:2], scores[:2].flatten().sort().values
    assert all(smallest(few, index) == expected[index] for index in (0, 300, 599))


def test_ranks_by_pairs_equal_a_stable_sort():
    scores = torch.rand(8, 50).mul(4).floor()
    order = scores.argsort(dim=0, stable=True)
    assert torch.equal(ranks(scores), order.argsort(dim=0))
