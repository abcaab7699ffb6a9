"""The race: the judge against the model with zeros written into it, the grid against counting, the whole against the plan."""

from __future__ import annotations

import copy
import json
import math
from threading import get_ident

import pytest
import torch
import torch.nn.functional as F

from hf_sparsity import Plan, SparsityConfig, make_plan, prune
from hf_sparsity.algorithm import Layer, Pattern
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.allocators.race import Race, parse_budget
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.calibration.splits import Split, split_of
from hf_sparsity.core.masks import keep_rows
from hf_sparsity.distributed import Processes
from hf_sparsity.evaluation import token_scores
from hf_sparsity.evaluation.divergence import DenseReference, PlanScores, compared, masked
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.race.candidates import Candidate, allocators, measurement_key, mixtures
from hf_sparsity.planning.race.evaluator import SearchBudget, cut
from hf_sparsity.planning.race.successive_halving import ScoredCandidate, winner
from hf_sparsity.planning.race.survey import ranked
from hf_sparsity.pruners import PRUNERS, Magnitude, SparseGPT, Wanda
from tests.conftest import tiny, tiny_batch

CHEAP = ("owl", "dlp", "qkvo")


def texts(count: int = 16, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 120, (count, tokens), generator=torch.Generator().manual_seed(3))


# ---- ranks


@pytest.mark.parametrize("name", [*PRUNERS, "variant", "foreign"])
def test_ranks_follow_each_pruners_own_comparison(name):
    class Foreign(Magnitude):
        """Compares whole columns, as none of ours does."""

        def mask(self, layer, scores):
            return keep_rows(scores.T, int(16 * layer.sparsity)).T

    pruner = {"variant": Wanda(variant=True), "foreign": Foreign(compare="row"), "sparsegpt": SparseGPT(block_size=16)}
    pruner = pruner.get(name) or PRUNERS[name]()
    scores = torch.randn(16, 40).abs()
    layer = Layer("x", torch.randn(16, 40))
    ranks = ranked(pruner, layer, scores)
    for sparsity in (0.25, 0.5, 0.75):
        layer.sparsity = sparsity
        mine = ranks.mask(min(range(len(ranks.zeros)), key=lambda k: abs(ranks.zeros[k] / 640 - sparsity)))
        # the steps are not the pruner's own counts, and SparseGPT and magnitude take one more: a few weights differ
        assert int((mine != pruner.mask(layer, scores)).sum()) <= 10


# ---- the judge


def by_hand(dense, sparse, ids):
    """(KL, loss) summed over the predictions of each sequence, from two plain forward passes."""
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, sparse))
    kl = (a.exp() * (a - b)).sum((1, 2))
    loss = F.nll_loss(b.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").reshape(len(ids), -1).sum(1)
    return torch.stack([kl, loss], dim=1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "mixtral", "qwen3_next", "mamba", "deepseek_v3"])
def test_the_judge_sees_what_pruning_does(name):
    model = tiny(name)
    layout = find_layers(model)
    ids = tiny_batch(name, sequences=5)["input_ids"]
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(w.shape, generator=generator) > 0.5 for n, w in layout.weights.items()}
    before = copy.deepcopy(model.state_dict())
    reference = DenseReference(model, layout, prepare_batches(model, ids))
    assert reference.replays
    rows = torch.tensor(reference.rows(lambda block: {n: masks[n] for n in block.weights}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    sparse = copy.deepcopy(model)
    for weight_name, weight in find_layers(sparse).weights.items():
        with torch.no_grad():
            weight.read().mul_(masks[weight_name])
    torch.testing.assert_close(rows[:, :2].double(), by_hand(model, sparse, ids), rtol=1e-4, atol=1e-3)
    assert rows[:, 2].tolist() == [ids.shape[1] - 1] * 5
    dense = torch.tensor(reference.rows())
    assert float(dense[:, 0].abs().max()) < 1e-3


def test_the_judge_of_a_written_model_is_the_same():
    model = tiny("llama")
    layout = find_layers(model)
    batches = prepare_batches(model, texts(4))
    masks = {n: torch.rand(w.shape) > 0.6 for n, w in layout.weights.items()}
    reference = DenseReference(model, layout, batches)
    rows = reference.rows(lambda block: {n: masks[n] for n in block.weights})
    for name, weight in layout.weights.items():
        with torch.no_grad():
            weight.read().mul_(masks[name])
    assert reference.rows() == rows


def test_a_head_that_looks_further_than_the_last_block_has_the_dense_model_run_along():
    model, first = tiny("llama"), {}  # thread -> what the first block gave in it
    model.model.layers[0].register_forward_hook(lambda _, args, output: first.update({get_ident(): output}))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + first.pop(get_ident()),))
    layout, ids = find_layers(model), texts(3)
    masks = {n: torch.rand(w.shape) > 0.6 for n, w in layout.weights.items()}
    reference = DenseReference(model, layout, prepare_batches(model, ids))
    assert not reference.replays
    ran = []
    for block in layout.blocks:
        block.module.mlp.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        assert torch.equal(reference.dense_logits(0), model(ids, use_cache=False).logits)
    assert len(ran) == 2 * len(layout.blocks), "it ran: once for us, once by itself"
    rows = torch.tensor(reference.rows(lambda block: {n: masks[n] for n in block.weights}))
    sparse = copy.deepcopy(model)
    for name, weight in find_layers(sparse).weights.items():
        with torch.no_grad():
            weight.read().mul_(masks[name])
    torch.testing.assert_close(rows[:, :2].double(), by_hand(model, sparse, ids), rtol=1e-4, atol=1e-3)


def test_padding_is_not_judged():
    ids = texts(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    dense, sparse = torch.randn(2, 8, 120), torch.randn(2, 8, 120)
    padded = compared({"input_ids": ids, "attention_mask": mask}, dense, sparse)
    alone = compared({"input_ids": ids[:1, :5]}, dense[:1, :5], sparse[:1, :5])
    assert padded[0] == pytest.approx(alone[0]) and padded[1][2] == 7


def test_long_text_is_compared_in_parts(monkeypatch):
    ids = texts(3, 20)
    dense, sparse = torch.randn(3, 20, 120), torch.randn(3, 20, 120)
    whole = compared({"input_ids": ids}, dense, sparse)
    monkeypatch.setattr(token_scores, "POSITIONS", 120 * 7)
    assert torch.allclose(torch.tensor(compared({"input_ids": ids}, dense, sparse)), torch.tensor(whole))


def test_masked_weights_stand_in_for_one_call_only():
    model = tiny("mixtral")
    block = find_layers(model).blocks[0]
    before = list(block.module.parameters())
    name = next(n for n in block.weights if n.endswith("[1]"))
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        masked(block, {name: torch.zeros(block.weights[name].shape)}),
    ):
        assert not block.weights[name].read().any() and block.weights[name.replace("[1]", "[0]")].read().all()
        raise RuntimeError("in the middle")
    assert [id(p) for p in block.module.parameters()] == [id(p) for p in before]


# ---- who enters, and who wins


def test_every_allocator_enters_and_uniform_first():
    found = allocators(())
    assert {a.name for a in found.values()} == set(ALLOCATORS) - {"msp"} and next(iter(found)) == "uniform"
    assert {a.name for a in allocators(("owl",)).values()} == {"uniform", "owl"}


@pytest.mark.parametrize("name", [name for name, allocator in ALLOCATORS.items() if allocator.only_in_assign])
def test_those_who_share_a_measure_would_have_measured_the_same(name):
    torch.manual_seed(0)
    from hf_sparsity.core.stats import InputStats

    def layer(shape):
        stats = InputStats(frozenset({"norms", "gram", "samples"}))
        stats.add(torch.randn(40, shape[1]), sequences=2, last=None)
        stats.close(2)
        return Layer("x", torch.randn(shape), stats, fisher=2.0)

    block = {"a": layer((24, 24)), "b": layer((48, 24))}
    for one in allocators((name,)).values():
        mine, shared = (json.dumps(a.measure(block, Wanda())) for a in (one, measurement_key(one)))
        assert mine == shared


def scored(values: dict[str, list[float]], kinds: dict[str, str]) -> list[ScoredCandidate]:
    ones = torch.full((len(next(iter(values.values()))),), 10.0, dtype=torch.float64)
    made = []
    for number, (name, kl) in enumerate(values.items()):
        scores = PlanScores(torch.tensor(kl, dtype=torch.float64), torch.tensor(kl, dtype=torch.float64), ones)
        made.append(ScoredCandidate(Candidate(name, kinds[name], {}, {}), (number,), [scores]))
    return made


def test_within_noise_the_simpler_plan_wins():
    kinds = {"uniform": "uniform", "owl": "single", "owl + dlp": "mixture", "search": "search"}
    base = torch.linspace(1, 3, 20, dtype=torch.float64)
    noise = 0.2 * torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = {"uniform": 0.0, "owl": -0.5, "owl + dlp": -0.5, "search": -0.5}

    def values(**change):
        return {n: (base + shift[n] + change.get(n.split()[0], 0.0) + noise * i).tolist() for i, n in enumerate(kinds)}

    assert winner(Race(), scored(values(), kinds), 0).name == "owl"
    assert winner(Race(), scored(values(search=-1), kinds), 0).name == "search"
    assert winner(Race(), scored(values(uniform=-0.5), kinds), 0).name == "uniform"
    assert winner(Race(), scored(values(uniform=-2), kinds), 0).name == "uniform"


def test_what_is_worse_than_something_simpler_is_no_choice():
    kinds = {"uniform": "uniform", "owl": "single", "owl + dlp": "mixture", "search": "search"}
    base = torch.linspace(1, 3, 20, dtype=torch.float64)
    noisy = base + torch.linspace(-2, 2, 20, dtype=torch.float64)[torch.randperm(20)] + 0.1
    kl = {"uniform": base + 1, "owl": base + 0.05, "owl + dlp": noisy, "search": base}
    assert winner(Race(), scored({n: v.tolist() for n, v in kl.items()}, kinds), 0).name == "search"


def test_mixtures_meet_the_budget():
    sizes = {"a": 100, "b": 300, "c": 50}
    plans = [
        Candidate(n, "single", s, {})
        for n, s in (("x", {"a": 0.9, "b": 0.5, "c": 0.9}), ("y", {"a": 0.4, "b": 0.7, "c": 0.7}))
    ]
    (made,) = mixtures(plans, sizes, 0.6, Pattern())
    assert sum(made.sparsities[n] * sizes[n] for n in sizes) == pytest.approx(0.6 * 450)
    assert made.sparsities["a"] - made.sparsities["b"] == pytest.approx(0.05)


# ---- text, budgets, bootstrap


def test_the_three_parts_of_the_text_share_nothing():
    data = [{"input_ids": torch.full((1, 10), i)} for i in range(40)]
    split = Split.of(data, 10**6)
    parts = [[int(b["input_ids"][0, 0]) for b in part] for part in vars(split).values()]
    assert [i for part in parts for i in part] == list(range(40)) and [len(p) for p in parts] == [15, 15, 10]
    assert [len(p) for p in vars(Split.of(data, 35)).values()] == [34, 3, 3]
    with pytest.raises(ValueError, match="give at least 8"):
        Split.of(data[:7], 100)
    facts = {"data": split.to_dict(data)}
    assert split_of(facts, data) == (data[:30], data[30:])
    assert split_of(facts, data[:20]) == (data[:20], []) and split_of(None, data) == (data, [])


def test_slices_are_cut_into_pieces_as_long_as_the_first():
    def cut_into(count: int, slices: tuple[int, ...]):
        data = [{"input_ids": torch.full((1, 10), i)} for i in range(count)]
        pieces, ends = cut(data, slices)
        assert [batch for piece in pieces for batch in piece] == data[: sum(map(len, pieces))]
        return [len(piece) for piece in pieces], ends

    assert cut_into(10, (15, 40, 400)) == ([2, 2, 2, 2, 2], [1, 2, 5])
    assert cut_into(10, (20, 50)) == ([2, 2, 1], [1, 3])
    assert cut_into(2, (15, 40, 400)) == ([2], [1])
    assert cut_into(3, (15, 40, 400)) == ([2, 1], [1, 2])


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("90s", {"seconds": 90}),
        ("10m", {"seconds": 600}),
        ("2000 evals", {"evals": 2000}),
        ("50M tokens", {"tokens": 5e7}),
        (None, {}),
    ],
)
def test_budgets(text, limit):
    assert parse_budget(text) == limit


@pytest.mark.parametrize("text", ["", "10", "ten minutes", "-5m", "0s", "5 M", 10, "10m 5s"])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="budget="):
        parse_budget(text)


def test_what_an_allowance_counts():
    budget = SearchBudget({"evals": 3}, Processes())
    assert not budget.over("a")
    budget.spent["evals"] = 3
    assert budget.over("b") and SearchBudget({"seconds": 1e-9}, Processes()).over("a")


# ---- the whole


def raced(model, **options):
    config = SparsityConfig(0.6, allocator={"name": "race", "candidates": CHEAP, "slices": (48, 96), **options})
    return make_plan(model, config, texts())


@pytest.fixture(scope="module")
def plan():
    return raced(tiny("llama"))


def test_a_race_makes_an_ordinary_plan(plan, tmp_path):
    model = tiny("llama")
    assert plan.sparsity == pytest.approx(0.6, abs=1e-6)
    assert {r["kind"] for r in plan.chosen["candidates"]} == {"uniform", "single", "mixture", "descent"}
    assert plan.chosen["winner"] in {r["name"] for r in plan.chosen["candidates"]}
    assert plan.chosen["slices"] == [48, 96] and plan.chosen["data"]["certificate"] == 4
    best = plan.chosen["candidates"][0]
    uniform = next(r for r in plan.chosen["candidates"] if r["kind"] == "uniform")
    assert len(best["kl"]) == len(uniform["kl"]) == 2 and best["kl"][-1] <= uniform["kl"][-1]
    slopes = plan.chosen["spent"]["tokens"] - 48 * plan.chosen["spent"]["evals"]
    assert slopes >= 4 * 48 * plan.chosen["descent"]["steps"] and slopes % (4 * 48) == 0
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.config["allocator"]["candidates"] == list(CHEAP)
    report = prune(model, loaded, texts())
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    pruned = model.config.sparsity_config["pruned"]
    assert pruned["data"]["sequences"] == 12, "the certificate's text is no part of the pruner's statistics"
    assert pruned["certificate"]["kl"] == pytest.approx(plan.chosen["certificate"]["kl"]["chosen"], rel=0.2)
    assert pruned["certificate"]["data"] == plan.chosen["certificate"]["data"]


def test_the_same_race_twice_is_the_same_plan(plan):
    assert raced(tiny("llama")).to_dict() == plan.to_dict()


def test_uniform_can_win():
    model = tiny("llama")
    with torch.no_grad():  # nothing to choose: any mask of a zero matrix is as good
        for weight in find_layers(model).weights.values():
            weight.read().zero_()
    plan = raced(model)
    assert plan.chosen["winner"] == "uniform" and {layer.sparsity for layer in plan.layers.values()} == {0.6}


@pytest.mark.parametrize(
    ("pattern", "pruner", "architecture"),
    [("*:8", "wanda", "llama"), ("unstructured", "sparsegpt", "llama"), ("unstructured", "magnitude", "mixtral")],
)
def test_a_race_of_other_patterns_pruners_and_experts(pattern, pruner, architecture):
    model = tiny(architecture)
    config = SparsityConfig(
        0.6, pattern, {"name": "race", "candidates": ("owl", "qkvo"), "slices": (48, 96)}, pruner=pruner
    )
    plan = make_plan(model, config, texts())
    plan.check_target()
    assert prune(model, plan, texts()).sparsity >= 0.6 - 0.01
    assert math.isfinite(plan.chosen["certificate"]["kl"]["chosen"])


def test_a_budget_ends_the_rounds():
    plan = raced(tiny("llama"), budget="1 evals")
    assert {len(r["kl"]) for r in plan.chosen["candidates"]} == {1}


def test_mistakes_are_told_before_work_starts():
    for allocator, message in (
        ({"name": "race", "candidates": ["owll"]}, "unknown candidate 'owll'; did you mean 'owl'"),
        ({"name": "race", "budget": "soon"}, "budget='soon'"),
        ({"name": "race", "metric": "accuracy"}, "use 'kl' or 'loss'"),
        ({"name": "race", "slices": [9, 3]}, "rising"),
        ({"name": "race", "confidence": 95}, "0.95"),
    ):
        with pytest.raises(ValueError, match=message):
            SparsityConfig(0.5, allocator=allocator)
    with pytest.raises(ValueError, match="nothing to decide"):
        SparsityConfig(pattern="2:4", allocator="race")
    model = tiny("llama")
    with pytest.raises(ValueError, match="needs calibration data"):
        make_plan(model, SparsityConfig(0.5, allocator="race"))
    with pytest.raises(ValueError, match="give at least 8"):
        make_plan(model, SparsityConfig(0.5, allocator="race"), texts(4))


def test_a_model_that_overflows_counts_as_bad_and_stays_a_number():
    ids = texts(2, 8)
    dense, broken = torch.randn(2, 8, 130), torch.full((2, 8, 130), math.nan)
    assert compared({"input_ids": ids}, dense, broken) == [[7e4, 7e4, 7.0]] * 2
    dense[..., :3] = -math.inf  # a vocabulary with holes
    assert compared({"input_ids": ids}, dense, dense)[0][0] == 0
