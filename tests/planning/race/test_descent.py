"""The descent: its steps on a fitness that is known, and in a race."""

from __future__ import annotations

import copy
import json
import logging
import math
from itertools import pairwise

import pytest
import torch
import transformers as hf

from hf_sparsity import SparsityConfig, make_plan
from hf_sparsity.allocators.race import Race
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.core.budget_grid import Grid
from hf_sparsity.evaluation.divergence import PlanScores
from hf_sparsity.planning.race.candidates import group_experts
from hf_sparsity.planning.race.descent import LONGEST, descend, level
from hf_sparsity.planning.race.evaluator import Evaluator
from hf_sparsity.streaming.gradients import BlocksNotAlone
from tests.conftest import Stopped, gemma3n, stop_after, tiny, tiny_batch
from tests.planning.race.searches import Quadratic, config, grid, texts
from tests.tools import mostly_slow

# ---- steps


def test_a_step_keeps_the_weights_and_goes_against_the_slopes():
    slopes, sizes = [5.0, -1.0, 2.0, 2.1, 0.0], [100, 10, 300, 50, 40]
    for shape in (0.1, 0.5, 2.0, 50.0):
        found = level(slopes, sizes, 0.1, shape)
        assert math.fsum(c * s for c, s in zip(found, sizes, strict=True)) == pytest.approx(0, abs=1e-9)
        assert max(map(abs, found)) <= 0.1 + 1e-12
        order = sorted(range(5), key=slopes.__getitem__)
        assert all(found[a] >= found[b] for a, b in pairwise(order))
        assert found[1] > 0 > found[0]
    gentle, rough = (sum(map(abs, level(slopes, sizes, 0.1, shape))) for shape in (0.5, 2.0))
    assert gentle < rough
    assert level([1.0, 1.0], sizes[:2], 0.1, 1.0) == [0.0, 0.0] == level([math.nan, 1.0], sizes[:2], 0.1, 1.0)


class Slope(Quadratic):
    """The fitness of `Quadratic`, whose slopes are known."""

    def __init__(self, one: Grid, limit: float = math.inf):
        super().__init__(one, limit)
        self.looked: list[list[int]] = []

    def slopes(self, point, pieces, metric):
        self.looked.append(list(pieces))
        now = self.grid.fractions(point)
        return {n: 2 * (now[n] - self.ideal[n]) for n in now}


def downhill(one: Evaluator, **options):
    start = one.grid.nearest(dict.fromkeys(one.grid.names, 0.6))
    found = descend(Race(**options), one, start, group_experts(one.grid.names))
    first, last = (s.mean() for s in one.scores_on([start, found.point], [0]))
    return start, found, last / first


def test_it_comes_down():
    torch.manual_seed(0)
    one = Slope(grid())
    start, found, rest = downhill(one)
    assert rest < 0.01 and found.points[0] == start and found.stopped == "no step is worth taking"
    assert all(0 <= one.grid.taken(p) - one.grid.mass < 16 for p in found.points)
    fractions = [one.grid.fractions(point) for point in found.points]
    steps = [max(abs(b[n] - a[n]) for n in a) for a, b in pairwise(fractions)]
    assert max(steps) < LONGEST * 2 + 0.05
    assert found.to_dict() == {"steps": found.steps, "gains": len(found.points) - 1, "stopped": found.stopped}


def test_steps_look_at_other_text_each_time_and_at_more_when_they_fail():
    torch.manual_seed(0)
    one = Slope(grid())
    downhill(one)
    asked = [pieces for n, pieces in one.asked[:-1]]
    assert one.looked[0] == [0] and asked[0] == [1] and one.looked[1] == [1] and asked[1] == [2]
    lengths = list(map(len, one.looked))
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] == 5 and set(lengths) <= {1, 2, 4, 5}
    assert all(set(a) != set(b) for a, b in zip(one.looked, asked, strict=False) if len(a) == 1), "judged on other text"


def test_it_ends_with_its_steps_its_budget_and_where_all_is_level():
    torch.manual_seed(0)
    assert downhill(Slope(grid()), descent=1)[1].to_dict() == {"steps": 1, "gains": 1, "stopped": "all steps are taken"}
    found = downhill(Slope(grid(), limit=10))[1]
    assert found.stopped == "the budget is spent" and found.steps == 2
    level = Slope(grid())
    level.slopes = lambda point, pieces, metric: dict.fromkeys(level.grid.names, 1.0)
    assert downhill(level)[1].to_dict() == {"steps": 1, "gains": 0, "stopped": "no step is worth taking"}


WORSE = PlanScores(*(torch.tensor([9.0], dtype=torch.float64),) * 2, torch.ones(1))


def test_on_a_grid_of_few_steps_it_moves_fewer_layers_instead_of_none():
    names = [f"layers.{i}.{p}" for i in range(4) for p in "abcdefgh"]
    coarse = Grid(
        {n: tuple(range(0, 512, 64)) for n in names}, dict.fromkeys(names, 512), dict.fromkeys(names, 1), 0.5, 8
    )

    class Late(Slope):
        """Nothing is better until steps are short."""

        def scores_on(self, points, pieces):
            found = super().scores_on(points, pieces)
            return found if len(self.asked) > 3 else [found[0], *[WORSE] * (len(points) - 1)]

    one = Late(coarse)
    one.ideal = {n: (4 + {"a": 1, "h": -1}.get(n[-1], 0)) / 8 for n in names}
    start = coarse.nearest(dict.fromkeys(names, 0.5))
    found = descend(Race(), one, start, group_experts(names))
    assert found.length < 0.0625 and coarse.fractions(found.point) == one.ideal
    assert {coarse.taken(p) for p in found.points} == {coarse.mass}
    assert level([4.0, 1.0, -1.0, -4.0], [1] * 4, 0.01, 0.5, 0.1)[0] == pytest.approx(-0.008)
    assert max(level([4.0, 1.0, -1.0, -4.0], [1] * 4, 0.1, 50.0, 0.3)) == pytest.approx(0.3)


def test_layers_that_move_together_have_their_weights_mean_slope():
    torch.manual_seed(0)
    one = Slope(grid())
    names = one.grid.names
    groups = [names[:3], names[3:4], names[4:]]
    start = one.grid.nearest(dict.fromkeys(names, 0.6))
    found = descend(Race(descent=1), one, start, groups)
    slopes, sizes = one.slopes(start, [0], "kl"), one.grid.sizes
    for group, slope in zip(groups, found.slopes, strict=True):
        assert slope == pytest.approx(sum(slopes[n] * sizes[n] for n in group) / sum(sizes[n] for n in group))
    old, new = (one.grid.fractions(point) for point in found.points)
    for group in groups:
        assert torch.tensor([new[n] - old[n] for n in group]).std(correction=0) < 0.05, "no layer goes its own way"


def test_steps_do_not_grow_for_ever():
    class Endless(Slope):
        """The longest step is always the best."""

        def scores_on(self, points, pieces):
            values = [100.0, *range(len(points) - 1)]
            return [PlanScores(*(torch.tensor([float(v)], dtype=torch.float64),) * 2, torch.ones(1)) for v in values]

        def slopes(self, point, pieces, metric):
            return {name: 1.0 if ".0." in name or ".1." in name else -1.0 for name in self.grid.names}

    torch.manual_seed(0)
    one = Endless(grid())
    start = one.grid.nearest(dict.fromkeys(one.grid.names, 0.6))
    found = descend(Race(descent=3), one, start, group_experts(one.grid.names))
    assert len(found.points) >= 3 and found.length == LONGEST


def test_ctrl_c_keeps_what_a_search_has():
    from hf_sparsity.allocators.race import Search

    torch.manual_seed(0)
    one = Slope(grid())
    known, start = one.slopes, one.grid.nearest(dict.fromkeys(one.grid.names, 0.6))

    def pressed(*given):
        if len(one.looked) == 2:
            raise KeyboardInterrupt
        return known(*given)

    one.slopes = pressed
    found = descend(Search(), one, start, group_experts(one.grid.names))
    assert found.stopped == "interrupted" and len(found.points) == 2
    with pytest.raises(KeyboardInterrupt):
        descend(Race(), one, start, group_experts(one.grid.names))


def test_experts_of_a_kind_have_one_slope():
    assert group_experts(["a.up[0]", "a.up[1]", "a.q", "b.up[0]"]) == [["a.up[0]", "a.up[1]"], ["a.q"], ["b.up[0]"]]


# ---- in a race


def test_a_race_ends_below_its_best():
    plan = make_plan(tiny("llama"), SparsityConfig(0.6, allocator=_race(12)), texts(24))
    rows = {row["name"]: row for row in plan.chosen["candidates"]}
    record = plan.chosen["descent"]
    assert record["gains"] > 2 and rows["descent"]["origin"] == {"descent": record} and record["from"] in rows
    assert rows["descent"]["kl"][-1] < rows[record["from"]]["kl"][-1]
    assert [row["name"] for row in plan.chosen["candidates"][:2]] == ["descent", record["from"]]
    plan.check_target()
    without = make_plan(tiny("llama"), SparsityConfig(0.6, allocator=_race(0)), texts(24))
    assert "descent" not in without.chosen and without.chosen["spent"]["tokens"] < plan.chosen["spent"]["tokens"]
    with pytest.raises(ValueError, match="descent=-1"):
        SparsityConfig(0.6, allocator=_race(-1))


def _race(descent: int) -> dict:
    return {"name": "race", "candidates": ("owl",), "slices": (48, 96, 192), "descent": descent}


def test_a_descent_goes_on_where_it_was_interrupted(tmp_path):
    config = SparsityConfig(0.6, allocator=_race(6))
    backward = []  # an entry for each backward pass through the model's head

    def descended(output=None):
        model = tiny("llama")
        model.lm_head.register_full_backward_hook(lambda *_: backward.append(1))
        return make_plan(model, config, texts(24), output_dir=output).to_dict()

    whole = descended()
    asked = len(backward)
    backward.clear()
    with pytest.raises(Stopped):
        descended(Output(tmp_path / "out", after_record=stop_after(3, "slopes")))
    assert len(backward) == 3 and json.dumps(descended(tmp_path / "out")) == json.dumps(whole)
    assert len(backward) == asked, "what was known before the interruption is not computed again"


@pytest.mark.parametrize(
    ("pattern", "pruner", "architecture"),
    mostly_slow(
        [("*:8", "wanda", "llama"), ("unstructured", "sparsegpt", "gpt_oss"), ("unstructured", "magnitude", "t5")],
        [("unstructured", "sparsegpt", "gpt_oss"), ("unstructured", "magnitude", "t5")],
    ),
)
def test_other_patterns_pruners_and_architectures(pattern, pruner, architecture):
    batch = tiny_batch(architecture, sequences=12)
    data = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(12)]
    plan = make_plan(tiny(architecture), SparsityConfig(0.6, pattern, _race(3), pruner=pruner), data)
    plan.check_target()
    assert plan.chosen["descent"]["steps"] >= 1


def test_a_model_without_slopes_races_on(caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        plan = make_plan(gemma3n(), SparsityConfig(0.6, allocator=_race(5)), texts(12))
    assert plan.chosen["descent"] == {
        "from": plan.chosen["descent"]["from"],
        "steps": 0,
        "gains": 0,
        "stopped": "the model has no slopes",
    }
    assert "no descent: " in caplog.text and "changes its arguments" in caplog.text
    assert "Fisher" not in caplog.text
    assert issubclass(BlocksNotAlone, ValueError)


def test_a_search_begins_where_the_descent_ends():
    plan = make_plan(tiny("llama"), config("400 evals", slices=(48, 96, 192), patience=5, descent=12), texts(24))
    rows = {row["name"]: row for row in plan.chosen["candidates"]}
    assert plan.chosen["search"]["curve"][0][1] == pytest.approx(
        min(r["kl"][-1] for n, r in rows.items() if n != "search" and len(r["kl"]) == 3)
    )
    assert rows["descent"]["origin"] == {"descent": plan.chosen["descent"]}


def test_ctrl_c_on_the_way_down_is_the_end_of_a_search():
    model = tiny("llama")
    before, backward = copy.deepcopy(model.state_dict()), []

    def press(*_):
        backward.append(1)
        if len(backward) == 3:  # in the middle of the third step's backward pass
            raise KeyboardInterrupt

    model.lm_head.register_full_backward_hook(press)
    plan = make_plan(model, config("10m", slices=(48, 96, 192), descent=12), texts(24))
    plan.check_target()
    assert plan.chosen["descent"]["stopped"] == "interrupted" and plan.chosen["descent"]["gains"] > 0
    assert "search" not in plan.chosen and plan.chosen["winner"] == "descent"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_streamed_model_comes_to_the_same_plan(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    config = SparsityConfig(0.6, allocator=_race(4))
    streamed, resident = (
        make_plan(model, config, texts(12))
        for model in (
            open_streamed(tmp_path / "dense"),
            hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
        )
    )
    assert streamed.layers == resident.layers and streamed.chosen["descent"] == resident.chosen["descent"]
    assert streamed.chosen["descent"]["gains"] > 0
