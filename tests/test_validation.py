"""The one check of numbers: what passes each kind of interval, and what the messages say."""

from __future__ import annotations

import math

import pytest

from hf_sparsity import BlockReconstruction, calibration_batches
from hf_sparsity.allocators import ALLOCATORS, ROW_ALLOCATORS
from hf_sparsity.allocators.race import Race, Search
from hf_sparsity.pruners import PRUNERS
from hf_sparsity.validation import check_number


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (0, {}),
        (-1.5, {}),
        (0, {"within": "[0, 1)"}),
        (1, {"within": "(0, 1]"}),
        (3, {"within": "[3, 3]", "whole": True}),
    ],
)
def test_numbers_inside_pass(value, options):
    check_number("x", value, **options)


@pytest.mark.parametrize(
    ("value", "within", "whole", "message"),
    [
        (1, "[0, 1)", False, "x=1 must be a number, at least 0 and below 1 (0.7, not 70)"),
        (0, "(0, inf)", False, "x=0 must be a number, above 0 (0.7, not 70)"),
        (1.5, "[1, inf)", True, "x=1.5 must be a whole number, at least 1 (0.7, not 70)"),
        (0, "[1, inf)", True, "x=0 must be a whole number, at least 1 (0.7, not 70)"),
        (2, "(0, 1]", False, "x=2 must be a number, above 0 and at most 1 (0.7, not 70)"),
        ("1", "(-inf, inf)", False, "x='1' must be a number (0.7, not 70)"),
    ],
)
def test_the_message_says_what_was_given_and_what_is_allowed(value, within, whole, message):
    with pytest.raises(ValueError) as error:
        check_number("x", value, within, whole=whole, hint=" (0.7, not 70)")
    assert str(error.value) == message


@pytest.mark.parametrize("value", [True, False, None, math.nan, math.inf, -math.inf, [1], 1j])
@pytest.mark.parametrize("within", ["(-inf, inf)", "[0, 2]"])
def test_what_is_no_number_is_none_in_any_interval(value, within):
    with pytest.raises(ValueError, match="must be a number"):
        check_number("x", value, within)


@pytest.mark.parametrize(
    ("make", "name", "good"),
    [
        (ALLOCATORS["owl"], "outlier", 5),
        (ALLOCATORS["alphapruning"], "floor", 0),
        (ALLOCATORS["farms"], "ratio", 1),
        (ALLOCATORS["farms"], "rows", 10),
        (ALLOCATORS["mrp"], "growth", 0.1),
        (ALLOCATORS["msp"], "mutation", 1),
        (ALLOCATORS["dlp"], "spread", 0),
        (ALLOCATORS["atp"], "trials", 3),
        (ALLOCATORS["lsa"], "trial", 0.5),
        (ALLOCATORS["fisher"], "spread", 0.5),
        (PRUNERS["ria"], "power", 0),
        (ALLOCATORS["fisher"], "spread", 0),
        (ROW_ALLOCATORS["trim"], "cap", 1),
        (PRUNERS["sparsegpt"], "damping", 1),
        (PRUNERS["sparsegpt"], "block_size", 1),
        (Race, "confidence", 0.5),
        (Race, "descent", 0),
        (Search, "offspring", 1),
        (BlockReconstruction, "lr", 1),
        (BlockReconstruction, "epochs", 1),
        (lambda **given: calibration_batches(["text"], None, **given), "sequences", None),
    ],
)
def test_hyperparameters_of_instances_are_numbers_in_range(make, name, good):
    """Also where no `SparsityConfig` looked at their types first."""
    if good is not None:
        make(**{name: good})
    for bad in (-1, math.nan, math.inf, "1", True):
        with pytest.raises(ValueError, match=rf"{name}=.*must be a (whole )?number"):
            make(**{name: bad})
