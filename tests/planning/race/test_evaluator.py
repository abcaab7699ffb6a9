"""The text is cut into pieces, and a budget counts what was spent."""

from __future__ import annotations

import torch

from hf_sparsity.distributed import Processes
from hf_sparsity.planning.race.evaluator import SearchBudget, cut


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


def test_what_an_allowance_counts():
    budget = SearchBudget({"evals": 3}, Processes())
    assert not budget.over("a")
    budget.spent["evals"] = 3
    assert budget.over("b") and SearchBudget({"seconds": 1e-9}, Processes()).over("a")
