"""Which sequence does what: statistics, choice and certificate share none."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity.calibration.splits import Split, split_of


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
