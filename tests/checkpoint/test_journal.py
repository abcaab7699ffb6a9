"""Work that is remembered: what is known is not done again, and the rest is shared."""

from __future__ import annotations

import json

import pytest

from hf_sparsity.checkpoint.journal import Journal, remembered
from hf_sparsity.distributed import Processes
from tests.tools import several

ITEMS = {"a": 1, "b": 2, "c": 3, "d": 4}


def squares(folder, processes, items):
    """The squares of the items, and which of them were computed here."""
    folder.mkdir(exist_ok=True)
    done: list[int] = []

    def square(item: int) -> int:
        done.append(item)
        return item**2

    return remembered(Journal(folder, processes), processes, "square", items, square), done


def in_part(processes, folder, items):
    return squares(folder, processes, items)


def test_each_is_kept_as_soon_as_it_is_there(tmp_path):
    def square(item):
        if item == 3:
            raise KeyboardInterrupt
        return item**2

    with pytest.raises(KeyboardInterrupt):
        remembered(Journal(tmp_path, Processes()), Processes(), "square", ITEMS, square)
    assert squares(tmp_path, Processes(), ITEMS) == ({"a": 1, "b": 4, "c": 9, "d": 16}, [3, 4])
    assert squares(tmp_path, Processes(), {"c": 3, "a": 1}) == ({"c": 9, "a": 1}, [])
    assert remembered(None, Processes(), "square", ITEMS, lambda item: -item) == {"a": -1, "b": -2, "c": -3, "d": -4}


def test_two_processes_take_their_parts_and_know_all(tmp_path):
    squares(tmp_path, Processes(), {"b": 2})
    with several(2) as two:
        first, second = two(in_part, tmp_path, ITEMS)
        assert first == ({"a": 1, "b": 4, "c": 9, "d": 16}, [1])
        assert second == (first[0], [3, 4])
        assert [found[1] for found in two(in_part, tmp_path, ITEMS)] == [[], []]


def test_each_record_is_told_once_it_is_on_disk(tmp_path):
    """The seam by which tests stop a run at a chosen moment."""
    seen = []

    def after_record(record):
        on_disk = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
        assert record["what"] == "complete" or record in on_disk
        seen.append(record["what"])

    journal = Journal(tmp_path, Processes(), after_record=after_record)
    journal.begin("prune", {"seed": 0})
    journal.block_done("a", {"file": "x"})
    assert seen == ["begin"]
    journal.commit(None)
    journal.remove()
    assert seen == ["begin", "block", "complete"] and not tmp_path.exists()
