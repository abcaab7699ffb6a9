"""A plan's file: whole, or with the record of the run beside it, from which the same plan comes."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hf_sparsity import Plan, SparsityConfig, demo, make_plan
from hf_sparsity.checkpoint.plan_file import PlanFile
from hf_sparsity.cli.main import main
from tests.conftest import stop_after, tiny
from tests.tools import count_calls, in_another_process

IDS = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(4))
SEARCH = SparsityConfig(
    0.6, allocator={"name": "search", "budget": "60 evals", "candidates": ("owl", "qkvo"), "slices": [64, 192]}
)


class Killed(BaseException):
    pass


def search(output=None):
    """(the plan, None if the run was stopped; how often the model's head was asked for predictions)."""
    model = tiny("llama")
    calls = count_calls(model.lm_head)
    try:
        plan = make_plan(model, SEARCH, IDS, output_dir=output)
    except Killed:
        plan = None
    return plan, len(calls)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(the plan, the calls of the head for it, those of them that come before the first plan is judged)."""
    plan, calls = search()
    file = tmp_path_factory.mktemp("first") / "plan.json"
    _, first = search(PlanFile(file, after_record=stop_after(1, "score", Killed)))
    return plan, calls, first - 2  # a plan is judged by one pass, beside one of the dense model


@pytest.mark.parametrize("after", [9, 55])
def test_an_interrupted_search_ends_with_the_same_plan_and_judges_nothing_twice(after, tmp_path, uninterrupted):
    whole, calls, prepared = uninterrupted
    file = tmp_path / "plan.json"
    stopped, before = search(PlanFile(file, after_record=stop_after(after, "score", Killed)))
    assert stopped is None
    assert (tmp_path / "plan.json.UNFINISHED" / "journal.jsonl").exists() and not file.exists()

    output = PlanFile(file)
    plan, then = search(output)
    assert plan.to_dict() == whole.to_dict()
    assert before + then == calls + prepared, "what was judged before the interruption was judged again"
    output.save(plan)
    assert Plan.load(file).to_dict() == whole.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_other_arguments_are_an_error_until_it_may_be_overwritten(tmp_path):
    file = tmp_path / "plan.json"
    with pytest.raises(Killed):
        output = PlanFile(file, after_record=stop_after(1, "begin", Killed))
        make_plan(tiny("llama"), SEARCH, IDS, output_dir=output)
    other = SparsityConfig(0.5)
    with pytest.raises(ValueError, match="other arguments: config was"):
        make_plan(tiny("llama"), other, output_dir=PlanFile(file))
    output = PlanFile(file, overwrite=True)
    assert (tmp_path / "plan.json.UNFINISHED").exists()  # nothing is touched before planning begins
    made = make_plan(tiny("llama"), other, output_dir=output)
    output.save(made)
    again = PlanFile(file)
    assert make_plan(tiny("llama"), other, output_dir=again).to_dict() == made.to_dict() and again.is_complete
    written = file.stat().st_mtime_ns
    again.save(made)
    assert file.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="complete already, of a run with other arguments: config was"):
        make_plan(tiny("llama"), SparsityConfig(0.6), output_dir=PlanFile(file))
    for text in ("{}", "mine"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="exists; choose another"):
            PlanFile(tmp_path / "other.json")
    (tmp_path / "other.json").unlink()
    with pytest.raises(ValueError, match="is a folder"):
        PlanFile(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def killed_at(records, arguments):
    """Runs the command, and ends this process without a word once its journal was written that often."""
    fsync, left = os.fsync, [records]

    def counted(file):
        fsync(file)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counted
    main(arguments)


def test_the_command_goes_on_where_it_was_killed(tmp_path, small_demo):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(text for _, text in demo.texts("calibration")[:6]))
    arguments = ["race", small_demo, "--calibration", str(text), "--sparsity", "0.7", "--candidates", "owl", "qkvo"]
    arguments += ["--sequences", "8", "--length", "64", "--search", "--budget", "40 evals", "--output"]
    assert main([*arguments, str(tmp_path / "whole.json")]) == 0
    file = tmp_path / "plan.json"
    assert in_another_process(killed_at, 12, [*arguments, str(file)]) == -signal.SIGKILL
    journal = tmp_path / "plan.json.UNFINISHED" / "journal.jsonl"
    assert journal.read_text().count('"score"') >= 5 and not file.exists()
    assert main([*arguments, str(file)]) == 0
    assert file.read_text() == (tmp_path / "whole.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "text.txt", "whole.json"]
