"""Progress: a line now and then where nobody looks at a terminal, silence on other processes."""

from __future__ import annotations

import logging

import pytest

from hf_sparsity import progress
from hf_sparsity.progress import Bar, follow


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines that are written if one may be written at any moment."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="hf_sparsity.progress")
    return caplog


def test_lines_say_what_how_far_and_how_long(lines):
    with Bar("Pruning", 5, "block", done=2) as bar:
        bar.step()
        bar.say("layer 1 of 7")
    assert [r.getMessage() for r in lines.records] == [
        "Pruning: 3 of 5 blocks, 0 s",
        "Pruning: 3 of 5 blocks, 0 s, layer 1 of 7",
    ]


def test_a_line_comes_only_now_and_then(lines, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 60.0)
    assert list(follow(range(3), "Evaluating", "batch")) == [0, 1, 2]
    assert not lines.records


def test_other_processes_are_silent(lines):
    assert list(follow(range(3), "Evaluating", "batch", shown=False)) == [0, 1, 2]
    assert not lines.records


def test_without_a_total_steps_are_counted(lines):
    with Bar("Racing", unit="plan") as bar:
        bar.step()
    assert lines.records[0].getMessage() == "Racing: 1 plans, 0 s"
