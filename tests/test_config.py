"""SparsityConfig: everything is checked the moment it is written down, and errors say what to do."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from hf_sparsity.algorithm import Allocator, Pruner, RowAllocator
from hf_sparsity.allocators import ALLOCATORS, ROW_ALLOCATORS
from hf_sparsity.allocators.owl import OWL
from hf_sparsity.allocators.trim import TRIM
from hf_sparsity.config import SparsityConfig
from hf_sparsity.pruners import PRUNERS
from hf_sparsity.pruners.sparsegpt import SparseGPT
from hf_sparsity.pruners.wanda import Wanda

# A value other than the default for every hyperparameter, so that a round trip that loses one shows.
CHANGED = {
    "owl": {"outlier": 7, "spread": 0.05, "group_spread": 1.5, "per": "layer"},
    "alphapruning": {"fit": "ks", "per": "layer", "spread": 0.2, "floor": 1e-5},
    "farms": {"rows": 100, "ratio": 2.0, "ops": 10, "fit": "mid", "per": "layer", "spread": 0.1, "floor": 1e-5},
    "mrp": {
        "outlier": 8.0,
        "start": 0.4,
        "step": 0.02,
        "cap": 0.9,
        "reading": "D4",
        "refresh": "F2",
        "growth": 0.05,
        "score": "wanda",
        "per": "layer",
    },
    "dlp": {"statistic": "median", "spread": 0.1, "per": "layer"},
    "atp": {"beta": 0.01, "step": 0.004, "trials": 5, "steps": 50},
    "lsa": {"spread": 0.07, "per": "layer", "columns": 64, "trial": 0.4},
    "qkvo": {"q": 0.1, "k": 0.05, "v": -0.1, "o": -0.05, "strength": 0.5},
    "fisher": {"spread": 0.05, "per": "layer"},
    "ria": {"power": 1.0, "compare": "layer"},
    "admm": {"ridge": 0.01, "rounds": 30, "choosing": 10, "ramp": True},
    "alps": {"compare": "row", "ridge": 0.1, "rho": 0.2, "rounds": 60, "tolerance": 1e-3},
    "msp": {
        "per": "layer",
        "steps": 8,
        "population": 10,
        "generations": 3,
        "parents": 2,
        "patience": 2,
        "mutation": 0.2,
        "kappas": [0.5],
        "noise": 0.1,
        "evaluations": 9,
    },
    "trim": {
        "rates": [0.1],
        "negative_rates": [-0.1],
        "negative": False,
        "iterations": 3,
        "quality": "mse_dim",
        "row_quality": "psnr",
        "cap": 0.9,
    },
    "magnitude": {"compare": "row"},
    "wanda": {"variant": True},
    "sparsegpt": {"damping": 0.1, "block_size": 64},
}
TABLES = [("allocator", ALLOCATORS), ("row_allocator", ROW_ALLOCATORS), ("pruner", PRUNERS)]
NAMES = [(role, name) for role, table in TABLES for name in table]


@dataclasses.dataclass(frozen=True)
class Deep(Allocator):
    """From outside the library: deeper layers lose more."""

    slope: float = 0.1
    name = "deep"

    def assign(self, measures, sizes, target, *, group=None, probe=None):
        """`target`, and more with depth."""
        return {n: target + self.slope * i for i, block in enumerate(measures) for n in block}


def refused(match, **arguments):
    with pytest.raises(ValueError, match=match):
        SparsityConfig(**arguments)


def test_defaults():
    config = SparsityConfig(0.5)
    assert (config.sparsity, config.pattern, config.row_allocator, config.ignore, config.seed) == (
        0.5,
        "unstructured",
        None,
        (),
        0,
    )
    assert config.allocator.name == "uniform" and config.pruner == Wanda()


def test_frozen():
    config = SparsityConfig(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.7  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"0\.5 contradicts"):
        dataclasses.replace(config, pattern="1:4")


@pytest.mark.parametrize("bad", [-0.1, 1, 1.0, 70, float("nan"), float("inf"), True, False, "0.5", [0.5]])
def test_sparsity_is_a_number_below_one(bad):
    refused(r"\[0, 1\)", sparsity=bad)


def test_sparsity_may_be_left_out_only_for_a_fixed_pattern():
    assert SparsityConfig(pattern="2:4").sparsity == 0.5
    assert SparsityConfig(pattern="1:4").sparsity == 0.75
    assert SparsityConfig(0.375, pattern="5:8").sparsity == 0.375
    assert SparsityConfig(0).sparsity == 0.0
    refused("sparsity is missing", pattern="unstructured")
    refused("sparsity is missing", pattern="*:8")


@pytest.mark.parametrize(
    "bad", ["2of4", "4:2", "4:4", "0:4", "2:*", "*:1", "2:129", "structured", "", "2 : 4", None, 24, "-1:4"]
)
def test_patterns(bad):
    refused(r"is unknown; use|needs 1 <= N < M", sparsity=0.5, pattern=bad)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sparsity": 0.7, "pattern": "2:4"}, r"0\.7 contradicts pattern='2:4'.*sparsity 0\.5.*'\*:4'"),
        ({"sparsity": 0.95, "pattern": "*:8"}, r"out of reach.*at most 0\.875"),
        ({"pattern": "2:4", "allocator": "owl"}, r"allocator 'owl' has nothing to decide.*'\*:4'"),
        ({"pattern": "2:4", "row_allocator": "trim"}, "row_allocator has nothing to decide"),
        ({"sparsity": 0.5, "pattern": "*:8", "row_allocator": "trim"}, "row_allocator has nothing to decide"),
        ({"pattern": "2:4", "pruner": {"name": "wanda", "variant": True}}, "variant.*unstructured"),
        ({"sparsity": 0.5, "pattern": "*:8", "pruner": {"name": "wanda", "variant": True}}, "variant.*unstructured"),
        (
            {"sparsity": 0.5, "row_allocator": "trim", "pruner": {"name": "wanda", "variant": True}},
            "variant.*no row_allocator",
        ),
    ],
)
def test_contradictions(arguments, says):
    refused(says, **arguments)


def test_a_pattern_with_the_number_kept_per_layer_goes_with_any_allocator():
    for name in ALLOCATORS:
        assert SparsityConfig(0.6, pattern="*:8", allocator=name).pattern == "*:8"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"allocator": "olw"}, "unknown allocator 'olw'; did you mean 'owl'"),
        ({"allocator": "alpha-pruning"}, "did you mean 'alphapruning'"),
        ({"pruner": "sparse_gpt"}, "unknown pruner 'sparse_gpt'; did you mean 'sparsegpt'"),
        ({"pruner": "xyz"}, r"unknown pruner 'xyz' \(known: magnitude, wanda, ria, sparsegpt, admm, alps\)"),
        ({"pruner": "Wanda"}, "did you mean 'wanda'"),
        ({"row_allocator": "trimm"}, "did you mean 'trim'"),
        ({"row_allocator": "wanda"}, "unknown row_allocator 'wanda'"),
        (
            {"allocator": {"name": "owl", "outliers": 7}},
            "allocator 'owl' has no hyperparameter 'outliers'; did you mean 'outlier'",
        ),
        ({"pruner": {"name": "wanda", "zzz": 7}}, r"has no hyperparameter 'zzz' \(known: variant\)"),
        ({"allocator": {"name": "uniform", "spread": 1}}, r"has no hyperparameter 'spread' \(known: none\)"),
        ({"allocator": {"outlier": 7}}, "allocator=.* is expected"),
        ({"allocator": None}, "allocator=None"),
        ({"pruner": 3}, "pruner=3: a name"),
        ({"allocator": OWL}, "an instance of Allocator is expected"),
        ({"allocator": Wanda()}, "an instance of Allocator is expected"),
        ({"pruner": OWL()}, "an instance of Pruner is expected"),
        ({"row_allocator": OWL()}, "an instance of RowAllocator is expected"),
    ],
)
def test_unknown_names_and_hyperparameters_are_named(arguments, says):
    refused(says, sparsity=0.5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"allocator": {"name": "owl", "outlier": "5"}}, "allocator 'owl': outlier='5' is not of type float"),
        ({"allocator": {"name": "owl", "spread": None}}, "spread=None is not of type float"),
        ({"allocator": {"name": "owl", "spread": True}}, "spread=True is not of type float"),
        ({"allocator": {"name": "farms", "rows": 0}}, "rows=0 must be"),
        ({"allocator": {"name": "farms", "rows": 12.5}}, "rows=12.5 is not of type int"),
        ({"allocator": {"name": "alphapruning", "fit": "pek"}}, "fit.*'pek'"),
        ({"allocator": {"name": "mrp", "step": 0}}, "mrp: step"),
        ({"allocator": {"name": "msp", "parents": 50}}, "msp: needs 1 <= parents <= population"),
        ({"allocator": {"name": "msp", "kappas": 0.4}}, r"kappas=0.4 is not of type tuple\[float"),
        ({"allocator": {"name": "msp", "kappas": ["a"]}}, r"kappas=\('a',\) is not of type"),
        ({"row_allocator": {"name": "trim", "quality": "best"}}, "trim: quality 'best' is unknown"),
        ({"pruner": {"name": "sparsegpt", "damping": -1}}, "sparsegpt: damping=-1 must be"),
        ({"pruner": {"name": "sparsegpt", "damping": float("nan")}}, "sparsegpt: damping=nan must be"),
        ({"pruner": {"name": "sparsegpt", "damping": "high"}}, "damping='high' is not of type float"),
        ({"pruner": {"name": "magnitude", "compare": "global"}}, "magnitude: compare='global'"),
        ({"pruner": {"name": "wanda", "variant": "yes"}}, "variant='yes' is not of type bool"),
    ],
)
def test_values_of_hyperparameters(arguments, says):
    refused(says, sparsity=0.5, **arguments)


def test_whole_numbers_and_none_are_fine_where_they_belong():
    config = SparsityConfig(
        0.5, allocator={"name": "mrp", "outlier": 7, "cap": None}, pruner={"name": "sparsegpt", "damping": 1}
    )
    assert (config.allocator.outlier, config.allocator.cap, config.pruner.damping) == (7, None, 1)


@pytest.mark.parametrize("bad", [5, ("q_proj", 3), ("",), None])
def test_ignore(bad):
    refused("ignore=", sparsity=0.5, ignore=bad)


def test_ignore_takes_one_name_or_several():
    assert SparsityConfig(0.5, ignore="q_proj").ignore == ("q_proj",)
    assert SparsityConfig(0.5, ignore=["a", "b.*"]).ignore == ("a", "b.*")


@pytest.mark.parametrize("bad", [True, 1.0, "0", None])
def test_seed(bad):
    refused("seed=", sparsity=0.5, seed=bad)


def test_algorithms_by_name_dict_and_instance():
    by_dict = SparsityConfig(
        0.5, allocator={"name": "owl", "outlier": 7.0}, pruner={"name": "sparsegpt", "block_size": 64}
    )
    by_instance = SparsityConfig(0.5, allocator=OWL(outlier=7.0), pruner=SparseGPT(block_size=64))
    assert by_dict == by_instance
    assert SparsityConfig(0.5, allocator="owl").allocator == OWL()
    assert SparsityConfig(0.5, row_allocator="trim").row_allocator == TRIM()


def test_an_instance_from_outside():
    mine = Deep(slope=0.2)
    config = SparsityConfig(0.5, allocator=mine)
    assert config.allocator is mine
    data = json.loads(json.dumps(config.to_dict()))
    assert data["allocator"] == {"name": "deep", "slope": 0.2}
    with pytest.raises(ValueError, match=r"unknown allocator 'deep'.*pass an instance of your own Allocator"):
        SparsityConfig.from_dict(data)
    assert SparsityConfig.from_dict(data | {"allocator": mine}) == config


def test_a_contract_cannot_be_passed_by_half():
    """An abstract method left out is Python's own error, before we ever see the instance."""
    for contract in (Allocator, RowAllocator, Pruner):
        with pytest.raises(TypeError, match="abstract"):
            type("Half", (contract,), {"name": "half"})()


@pytest.mark.parametrize(("role", "name"), NAMES, ids=[n for _, n in NAMES])
@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
def test_round_trip_through_json(role, name, changed):
    given = {"name": name} | (CHANGED.get(name, {}) if changed else {})
    config = SparsityConfig(0.6, ignore=("q_proj", "*.mlp.*"), seed=7, **{role: given})
    text = json.dumps(config.to_dict())
    again = SparsityConfig.from_dict(json.loads(text))
    assert again == config
    assert json.dumps(again.to_dict()) == text
    written = json.loads(text)[role]
    assert {key: written[key] for key in given} == given
    if changed:
        defaults = SparsityConfig(0.6, **{role: name}).to_dict()[role]
        assert [key for key in written if key != "name" and written[key] == defaults[key]] == []


def test_from_dict_names_unknown_keys():
    with pytest.raises(ValueError, match="no 'sparsty'; did you mean 'sparsity'"):
        SparsityConfig.from_dict({"sparsty": 0.5})
    with pytest.raises(ValueError, match=re.escape("no 'calibration'")):
        SparsityConfig.from_dict({"sparsity": 0.5, "calibration": "c4"})


@pytest.mark.parametrize("data", [None, 5, [], ["sparsity"], "abc"])
def test_from_dict_wants_an_object(data):
    with pytest.raises(ValueError):
        SparsityConfig.from_dict(data)
