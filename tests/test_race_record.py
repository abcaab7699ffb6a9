"""The story of a race: what it saw beyond the plan it chose, and that a resumed run has it, too."""

from __future__ import annotations

import json
import math

import pytest

from hf_sparsity import make_plan
from hf_sparsity.checkpoint.output import Output
from tests.conftest import Stopped, stop_after, tiny
from tests.planning.race.searches import config, texts
from tests.tools import count_calls


@pytest.fixture(scope="module")
def plan():
    return make_plan(tiny("llama"), config("60 evals", candidates=("owl", "dlp", "qkvo")), texts())


def test_the_winner_comes_first_and_is_the_plan(plan):
    first, *others = plan.story.plans
    assert first == plan.chosen["winner"] and plan.story.plans[first] == {n: x.sparsity for n, x in plan.layers.items()}
    rows = {row["name"]: row["kind"] for row in plan.chosen["candidates"]}
    assert {rows[name] for name in (first, *others)} == set(rows.values()), "the best of each kind"
    assert len(plan.story.plans) == 6 and all(set(one) == set(plan.layers) for one in plan.story.plans.values())


def test_measures_have_their_names_and_every_layer(plan):
    dlp = {"dlp(statistic=mean)", "dlp(statistic=median)"}
    assert set(plan.story.measures) == {"owl(outlier=5.0)", "owl(outlier=7.0)"} | dlp, (
        "qkvo and uniform look at nothing"
    )
    seen = texts()[: plan.chosen["data"]["statistics"]]
    owl = make_plan(tiny("llama"), {"sparsity": 0.6, "allocator": {"name": "owl", "outlier": 5.0}}, seen)
    for name, layer in owl.layers.items():
        assert plan.story.measures["owl(outlier=5.0)"][name] == layer.measure


def test_the_curve_is_the_plans_with_seconds_and_an_end(plan):
    curve = plan.story.curve
    assert [[tokens, value] for tokens, value, _ in curve[:-1]] == plan.chosen["search"]["curve"]
    assert curve[-1][0] >= curve[-2][0] and curve[-1][1] == curve[-2][1], "the end of the search gains nothing"
    seconds = [point[2] for point in curve]
    assert seconds[0] > 0 and seconds == sorted(seconds) and seconds[-1] <= plan.story.seconds
    assert "seconds" not in json.dumps(plan.to_dict()["chosen"]), "seconds would make two plans of one seed differ"


def test_an_ordinary_plan_has_none():
    assert make_plan(tiny("llama"), config().from_dict({"sparsity": 0.5, "allocator": "uniform"})).story is None


def test_a_resumed_run_has_the_same_story(tmp_path):
    made = make_plan(tiny("llama"), config(), texts(), output_dir=tmp_path / "out")
    model = tiny("llama")
    judged = count_calls(model.lm_head)
    again = make_plan(model, config(), texts(), output_dir=tmp_path / "out")
    assert not judged, "it was done"
    assert again == made and again.story == made.story and again.story.curve


def test_time_before_an_interruption_counts(tmp_path):
    with pytest.raises(Stopped):
        output = Output(tmp_path / "out", after_record=stop_after(39, "score"))
        make_plan(tiny("llama"), config(), texts(), output_dir=output)
    journal = next((tmp_path / "out").rglob("journal.jsonl"))
    records = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
    late = {}  # as if it had been a slow machine
    for record in records:
        if record["what"] == "elapsed":
            record["value"] += 1000
            late[record["name"]] = record["value"]
    assert late, "the search had begun"
    journal.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    resumed = make_plan(tiny("llama"), config(), texts(), output_dir=tmp_path / "out")
    assert resumed.story.curve[0][2] == late["generation 0"] and resumed.story.curve[-1][2] > max(late.values())
    assert resumed.to_dict() == make_plan(tiny("llama"), config(), texts()).to_dict()


def test_numbers_that_are_none_stay_out(plan):
    assert all(math.isfinite(value) for numbers in plan.story.measures.values() for value in numbers.values())
