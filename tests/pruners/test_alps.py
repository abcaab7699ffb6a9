"""ALPS, ADMM-Grad and RIA against values of the authors' own code, and what each promises beyond them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf_sparsity.algorithm import NORMS, Layer, Pattern
from hf_sparsity.core.least_squares import Problem, refit, solve_on_mask
from hf_sparsity.core.stats import InputStats
from hf_sparsity.pruners import PRUNERS
from hf_sparsity.pruners.admm import ADMM
from hf_sparsity.pruners.alps import ALPS, Search
from hf_sparsity.pruners.ria import RIA
from tests.conftest import GOLDENS
from tests.pruners import layers
from tests.pruners.layers import NAMES, error, with_gram

SETTINGS = {"50": (0.5, "unstructured"), "70": (0.7, "unstructured"), "2of4": (0.5, "2:4"), "4of8": (0.5, "4:8")}


golden = pytest.fixture(scope="module")(layers.golden)


@pytest.fixture(scope="module")
def unit():
    with safe_open(GOLDENS / "edge/alps_unit.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()} | {"info": json.loads(file.metadata()["info"])}  # noqa: SIM118


def kept(golden, method, tag, short):
    width = golden[f"weight.{short}"].shape[1]
    bits = np.unpackbits(golden[f"{method}.{tag}.{short}"].numpy(), axis=-1, count=width)
    return ~torch.from_numpy(bits.astype(bool))


@pytest.mark.parametrize("tag", SETTINGS)
@pytest.mark.parametrize("short", NAMES)
def test_alps_has_the_authors_mask(golden, short, tag):
    layer = with_gram(golden[f"weight.{short}"], golden[f"gram.{short}"], *SETTINGS[tag])
    new = ALPS().prune(layer)
    differing = int(((new != 0) != kept(golden, "alps", tag, short)).sum())
    assert differing <= (0 if short == "q" else 0.01 * new.numel())
    assert error(layer, new) < error(layer, PRUNERS["sparsegpt"]().prune(layer))


@pytest.mark.parametrize("case", ["50", "90", "zeros_50", "keep1of4", "keep2of4", "lowrank_10", "lowrank_30", "rho_3"])
def test_alps_takes_the_authors_course(unit, case):
    """Mask, values and every check: where rho grows, where it shrinks, where the search starts again."""
    facts, result = unit["info"][f"alps_{case}"], unit[f"alps_{case}"]
    given = facts["arguments"]
    pattern = f"{given['nm_n']}:{given['nm_m']}" if "nm_n" in given else "unstructured"
    layer = with_gram(unit[facts["weight"]], unit[facts["H"]], given["sp"], pattern)
    pruner = ALPS(rho=given.get("rho", 0.1))
    new = pruner.prune(layer)
    assert torch.equal(new != 0, result != 0)
    problem = Problem.of(layer.stats.gram, pruner.ridge)
    search = Search(pruner, layer, problem)
    values, vectors = torch.linalg.eigh(problem.matrix.double())
    while not search.done:
        search.advance((vectors / (values + search.rho) @ vectors.T).float())
    change = [(weight - layer.weight) * problem.scale for weight in (new, result)]
    assert problem.error(change[0]).sum() <= problem.error(change[1]).sum() * 1.001
    start = search.smooth * (new != 0)
    ten, _ = solve_on_mask(problem, search.dense, start, new != 0, tolerance=0, limit=10)  # as many as the authors
    assert (ten / problem.scale - result).norm() < 1e-3 * result.norm()
    assert [check[:2] for check in search.checks] == [tuple(check[:2]) for check in facts["checks"]]
    assert [check[2] for check in search.checks] == pytest.approx([check[2] for check in facts["checks"]], rel=1e-6)


def test_what_has_no_input_keeps_nothing(unit):
    layer = with_gram(unit["W"], unit["H_dead"], 0.6)
    new = ALPS().prune(layer)
    assert (new[:, [3, 17, 40]] == 0).all() and int((new == 0).sum()) == round(0.6 * new.numel())
    assert (unit["alps_dead_60"][:, [3, 17, 40]] != 0).any(), "the authors' does"


def test_rows_may_keep_equally_many(golden):
    layer = with_gram(golden["weight.q"], golden["gram.q"], 0.7)
    new = ALPS(compare="row").prune(layer)
    assert set((new == 0).sum(1).tolist()) == {int(0.7 * 128)}
    assert error(layer, ALPS().prune(layer)) < error(layer, new) < error(layer, PRUNERS["wanda"]().prune(layer))


@pytest.mark.parametrize("tag", ["50", "70", "2of4"])
@pytest.mark.parametrize("short", NAMES)
def test_admm_has_the_authors_mask(golden, short, tag):
    layer = with_gram(golden[f"weight.{short}"], golden[f"gram.{short}"], *SETTINGS[tag])
    assert torch.equal(ADMM().prune(layer) != 0, kept(golden, "admm", tag, short))


@pytest.mark.parametrize(("case", "hessian", "sparsity"), [("50", "H_correlated", 0.5), ("dead_60", "H_dead", 0.6)])
def test_admm_has_the_authors_weights(unit, case, hessian, sparsity):
    new = ADMM().prune(with_gram(unit["W"], unit[hessian], sparsity))
    assert torch.equal(new != 0, unit[f"admm_{case}"] != 0)
    assert (new - unit[f"admm_{case}"]).norm() < 5e-5 * new.norm()


def test_the_ramp_is_used_and_any_pattern_is_honoured(golden):
    layer = with_gram(golden["weight.o"], golden["gram.o"], 0.5)
    assert error(layer, ADMM(ramp=True).prune(layer)) < 0.95 * error(layer, ADMM().prune(layer))
    new = ADMM().prune(with_gram(golden["weight.o"], golden["gram.o"], 0.5, "4:8"))
    groups = (new.unflatten(1, (-1, 8)) != 0).sum(-1)
    assert (groups == 4).all() and not ((new.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()


@pytest.mark.parametrize("tag", ["50", "70", "rows_50", "rows_70", "2of4"])
@pytest.mark.parametrize("short", NAMES)
def test_ria_has_the_authors_mask(golden, short, tag):
    stats = InputStats(frozenset({NORMS}))
    stats.mean_sq, stats.tokens, stats.sequences = golden[f"ria.scaler_row.{short}"].clone(), 1024, 16
    sparsity, pattern = SETTINGS[tag.removeprefix("rows_")]
    layer = Layer("x", golden[f"weight.{short}"], stats=stats, sparsity=sparsity, pattern=Pattern.parse(pattern))
    pruner = RIA(compare="row" if tag.startswith("rows") else "layer")
    scores = pruner.scores(layer)
    if short == "q":
        torch.testing.assert_close(scores, golden["ria.scores.q"], rtol=1e-6, atol=0)
    assert torch.equal(pruner.mask(layer, scores), kept(golden, "ria", tag, short))


def exact(layer, keep, ridge=0.01):
    """The least-squares optimum on a mask, row by row, in float64."""
    gram = layer.stats.gram.double().clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    new = torch.zeros_like(layer.weight, dtype=torch.float64)
    for row, mask in enumerate(keep):
        right = gram[mask] @ layer.weight[row].double()
        new[row, mask] = torch.linalg.solve(gram[mask][:, mask], right)
    return new.float()


@pytest.mark.parametrize("short", NAMES)
@pytest.mark.parametrize("tag", ["70", "2of4"])
def test_a_refit_reaches_the_optimum_on_any_mask(golden, short, tag):
    layer = with_gram(golden[f"weight.{short}"], golden[f"gram.{short}"], *SETTINGS[tag])
    pruned = PRUNERS["wanda"]().prune(layer)
    new, before, after = refit(layer.weight, pruned, layer.stats.gram)
    assert torch.equal(new != 0, pruned != 0) and after < 0.9 * before
    best = error(layer, exact(layer, pruned != 0))
    assert error(layer, new) == pytest.approx(best, rel=1e-3)


def test_a_refit_never_makes_a_row_worse(golden):
    layer = with_gram(golden["weight.q"], golden["gram.q"], 0.7)
    best, _, lowest = refit(layer.weight, PRUNERS["wanda"]().prune(layer), layer.stats.gram)
    again, before, after = refit(layer.weight, best, layer.stats.gram, limit=1, tolerance=0)
    assert after <= before == pytest.approx(lowest, rel=1e-5) and torch.equal(again != 0, best != 0)
    half, before, after = refit(layer.weight.bfloat16(), best.bfloat16(), layer.stats.gram)
    assert half.dtype == torch.bfloat16 and after <= before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ALPS(compare="column"), "compare is 'column'"),
        (lambda: ALPS(ridge=0), "ridge=0 must be"),
        (lambda: ALPS(rounds=2), "at least 3"),
        (lambda: ADMM(ridge=-1), "ridge=-1 must be"),
        (lambda: ADMM(choosing=30), "choosing=30 must be"),
        (lambda: RIA(compare="x"), "compare is 'x'"),
        (lambda: RIA(power=-1), "power=-1 must be"),
    ],
)
def test_bad_hyperparameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["alps", "admm"])
def test_without_a_gram_matrix_it_says_so(name):
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        PRUNERS[name]().prune(Layer("x", torch.ones(2, 4), sparsity=0.5))
