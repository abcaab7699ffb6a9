"""The search: the budget of every point, what one evaluation costs, and one plan from one seed, however it is run."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random

import pytest
import torch

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.algorithm import Pattern
from hf_sparsity.allocators.race import Search
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.calibration.splits import FEWEST_SEQUENCES
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.core.budget_grid import Grid
from hf_sparsity.distributed import Processes
from hf_sparsity.evaluation.divergence import DenseReference, PlanScores
from hf_sparsity.model.layers import find_layers
from hf_sparsity.planning.race.evaluator import Evaluator, SearchBudget
from hf_sparsity.planning.race.evolution import Moves, run_search
from hf_sparsity.planning.race.survey import survey
from hf_sparsity.pruners import Wanda
from tests.conftest import Stopped, stop_after, tiny
from tests.planning.race.searches import Quadratic, config, grid, texts
from tests.tools import count_calls, fail_at, several


def blocks(names) -> list[list[str]]:
    return [[n for n in names if n.startswith(f"layers.{i}.")] for i in range(4)]


# ---- moves


def test_moves_trade_weights_for_weights():
    one = grid()
    moves = Moves(one, blocks(one.names), Random(0))
    now = one.fractions(one.nearest(dict.fromkeys(one.names, 0.6)))
    before, changed = dict(now), set()
    for _ in range(50):
        moves.transfer(now)
        changed |= {n for n in now if now[n] != before[n]}
    assert sum((now[n] - before[n]) * one.sizes[n] for n in now) == pytest.approx(0, abs=1e-6)
    assert changed == set(one.names)


def test_every_child_has_the_same_budget_and_steps_are_fine_on_small_layers():
    one = grid()
    moves = Moves(one, blocks(one.names), Random(0))
    parent = one.nearest(dict.fromkeys(one.names, 0.6))
    other = [{name: 0.3 if ".q" in name else 0.8 for name in one.names}]
    seen = set()
    for _ in range(100):
        child = moves.child(parent, other, dict.fromkeys(one.names, 0.01))
        taken = one.taken(child)
        assert 0 <= taken - one.mass < 16  # a step of the smallest layer, a weight in each of its rows
        seen.add(child)
        parent = child
    assert len(seen) > 60


def test_experts_and_projections_move_together():
    names = [f"layers.{i}.experts.up[{j}]" for i in range(2) for j in range(3)] + ["layers.0.q", "layers.1.q"]
    one = Grid(dict.fromkeys(names, range(9)), dict.fromkeys(names, 8), dict.fromkeys(names, 1), 0.5)
    moves = Moves(one, [[n for n in names if f".{i}." in n] for i in range(2)], Random(0))
    assert sorted(map(len, moves.single)) == [1, 1, 3, 3] and sorted(map(len, moves.kinds)) == [2, 6]


# ---- the evolution, on a fitness that is known


def searched(limit: float, seed: int = 0):
    evaluator = Quadratic(grid(), limit)
    start = evaluator.grid.nearest(dict.fromkeys(evaluator.grid.names, 0.6))
    return evaluator, run_search(Search(budget=None), evaluator, [start], blocks(evaluator.grid.names), seed)


def test_it_finds_what_can_be_found():
    torch.manual_seed(0)
    evaluator, found = searched(1500)
    assert found.curve[0][1] > 0.01 and found.curve[-1][1] < found.curve[0][1] / 20
    assert all(a[1] > b[1] for a, b in zip(found.curve, found.curve[1:], strict=False))
    assert 0 <= evaluator.grid.taken(found.point) - evaluator.grid.mass < 16
    assert evaluator.budget.spent["evals"] < 1500 + 20 and found.stopped == "the budget is spent"


def test_children_are_judged_on_one_piece_few_on_more_and_one_on_all():
    torch.manual_seed(0)
    asked = searched(500)[0].asked[1:]
    first = [pieces[0] for n, pieces in asked if n == 9]
    assert first == [i % 5 for i in range(len(first))], "another piece in each generation"
    assert {len(pieces) for n, pieces in asked if n == 9} == {1}
    assert {n for n, pieces in asked if len(pieces) == 3} <= {2, 3}, "the parent and at most a quarter of eight"
    assert {n for n, pieces in asked if len(pieces) == 5} <= {1, 2}, "the parent and the best; then what it has gained"
    second = [(one[1][0], sorted(two[1])) for one, two in pairwise(asked) if len(two[1]) == 3]
    assert second and all(pieces == sorted((i + k) % 5 for k in range(3)) for i, pieces in second)


class Deceptive(Quadratic):
    """All but uniform look better on the first four pieces, and are worse on the fifth."""

    def scores_on(self, points, pieces):
        self.asked.append((len(points), list(pieces)))
        self.budget.spent["evals"] += len(points)
        start = self.grid.nearest(dict.fromkeys(self.grid.names, 0.6))
        value = [[0.0 if p == start else 10.0 if i == 4 else -1.0 for i in pieces] for p in points]
        return [PlanScores(*(torch.tensor([sum(v) / len(v)], dtype=torch.float64),) * 2, torch.ones(1)) for v in value]


def test_what_is_learnt_by_heart_is_not_kept():
    evaluator = Deceptive(grid(), 400)
    start = evaluator.grid.nearest(dict.fromkeys(evaluator.grid.names, 0.6))
    found = run_search(Search(budget=None), evaluator, [start], blocks(evaluator.grid.names), 0)
    assert found.point == start and len(found.curve) == 1
    assert any(len(pieces) == 5 for _, pieces in evaluator.asked[1:])


def test_one_seed_one_way():
    torch.manual_seed(0)
    one = searched(300)[1]
    torch.manual_seed(0)
    again = searched(300)[1]
    torch.manual_seed(0)
    assert one == again and searched(300, seed=1)[1].point != one.point


def test_it_stops_without_gain():
    torch.manual_seed(0)
    evaluator = Quadratic(grid(), 10**6)
    best = evaluator.grid.nearest(evaluator.ideal)
    found = run_search(Search(budget=None, patience=7), evaluator, [best], blocks(evaluator.grid.names), 0)
    assert found.point == best and found.generations == 7 and "no gain in 7" in found.stopped
    assert {len(pieces) for _, pieces in evaluator.asked[1:]} == {1}, (
        "who is no better on the first piece is not asked again"
    )


# ---- the whole


def test_a_search_beats_the_race_it_came_from_and_its_plan_can_be_carried_out():
    model = tiny("llama")
    plan = make_plan(model, config("150 evals"), texts())
    table = {r["name"]: r for r in plan.chosen["candidates"]}
    assert table["search"]["kl"][-1] < min(r["kl"][-1] for n, r in table.items() if n != "search" and len(r["kl"]) == 2)
    curve = [value for _, value in plan.chosen["search"]["curve"]]
    assert len(curve) > 2 and curve == sorted(curve, reverse=True)
    layers = plan.layers
    if plan.chosen["winner"] != "search":
        pytest.skip("within noise on this machine")
    largest = max(layers, key=lambda n: layers[n].size)
    report = prune(model, plan, texts())
    for name, layer in report.layers.items():
        assert name == largest or abs(layer.zeros - layers[name].sparsity * layer.size) <= layers[name].size / 48
    uniform = prune(tiny("llama"), make_plan(tiny("llama"), SparsityConfig(0.6)), texts())
    assert report.sparsity == pytest.approx(uniform.sparsity, abs=1e-3)


def test_one_evaluation_is_one_forward_pass_and_takes_no_statistic():
    model = tiny("llama")
    layout, data = find_layers(model), prepare_batches(model, texts(4))
    scored = []  # the layers whose weights the pruner scored

    class Counted(Wanda):
        def scores(self, layer):
            scored.append(layer.name)
            return super().scores(layer)

    _, ranks = survey(model, layout, data, allocators=(), pruner=Counted(), pattern=Pattern())
    assert scored == list(layout.weights)
    sizes = {n: r.size for n, r in ranks.items()}
    made = Grid({n: r.zeros for n, r in ranks.items()}, sizes, {n: r.cells for n, r in ranks.items()}, 0.6)
    evaluator = Evaluator([DenseReference(model, layout, data)], made, ranks, SearchBudget({}, Processes()))
    assert all(r.survives.dtype == torch.uint8 and r.survives.numel() == r.size for r in ranks.values())
    runs = {"blocks": 0, "tokens": 0, "head": 0}

    def block(module, args, output):
        runs["blocks"] += 1
        runs["tokens"] += (output[0] if isinstance(output, tuple) else output).shape[:2].numel()

    counted = [b.module.mlp.register_forward_hook(block) for b in layout.blocks]
    counted.append(model.lm_head.register_forward_hook(lambda *_: runs.update(head=runs["head"] + 1)))
    evaluator.scores([made.nearest(dict.fromkeys(sizes, 0.6))], 0)
    evaluator.scores([made.nearest(dict.fromkeys(sizes, 0.6))], 0)  # known
    for hook in counted:
        hook.remove()
    assert runs == {"blocks": 3, "tokens": 3 * 4 * 24, "head": 2} and len(scored) == len(layout.weights)
    assert evaluator.budget.spent == {"evals": 1, "tokens": 96}


def test_the_same_plan_after_an_interruption_and_from_memory(tmp_path):
    whole = make_plan(tiny("llama"), config(), texts()).to_dict()
    with pytest.raises(Stopped):
        make_plan(
            tiny("llama"), config(), texts(), output_dir=Output(tmp_path / "out", after_record=stop_after(29, "score"))
        )
    model = tiny("llama")
    calls = count_calls(model.lm_head)
    resumed = make_plan(model, config(), texts(), output_dir=tmp_path / "out").to_dict()
    assert json.dumps(resumed) == json.dumps(whole)
    assert len(calls) < 2 * 50, "what was judged before is remembered; a plan is judged by two calls of the head"
    other = make_plan(tiny("llama"), config(seed=1), texts()).to_dict()
    assert other["chosen"]["search"] != whole["chosen"]["search"]


def test_ctrl_c_gives_the_best_so_far():
    model = tiny("llama")
    fail_at(model.lm_head, 100, KeyboardInterrupt)
    plan = make_plan(model, config("10m"), texts())
    plan.check_target()
    assert plan.chosen["search"]["stopped"] == "interrupted" and plan.chosen["search"]["generations"] > 0


def test_a_time_that_was_spent_before_an_interruption_counts(tmp_path):
    def budget(output):
        return SearchBudget({"seconds": 60}, Processes(), output.journal)

    output = Output(tmp_path / "out")
    output.begin("plan", {})
    first = budget(output)
    assert first.seconds("round 1") == output.journal.recall("elapsed", "round 1") < 60
    output.journal.remember("elapsed", "generation 0", 10**6)  # it took long to come there
    later = budget(Output(tmp_path / "out"))
    assert not later.over("round 1") and later.over("generation 0") and later.over("generation 1")


def plan_of(processes: Processes) -> str:
    return json.dumps(make_plan(tiny("llama"), config(), texts()).to_dict())


def test_the_same_plan_from_two_processes():
    with several(2) as call:
        first, second = call(plan_of)
    assert first == second == plan_of(Processes())


def test_the_search_says_no_to_nonsense():
    for options in ({"offspring": 0}, {"patience": 0}, {"budget": "many"}):
        with pytest.raises(ValueError, match=r"offspring|patience|budget"):
            config(**options)
    assert FEWEST_SEQUENCES == 8
