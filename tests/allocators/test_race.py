"""Budgets of a search, as they are written."""

from __future__ import annotations

import pytest

from hf_sparsity.allocators.race import parse_budget


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
