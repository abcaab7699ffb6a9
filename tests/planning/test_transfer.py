"""A plan on another model of the same shapes: compared with uniform before it is carried out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from hf_sparsity import Plan, SparsityConfig, make_plan, prune
from hf_sparsity.algorithm import Pattern
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.evaluation.certificate import certify
from hf_sparsity.plan import LayerPlan
from hf_sparsity.planning.transfer import verdict
from tests.conftest import tiny

IDS = torch.randint(3, 120, (12, 48), generator=torch.Generator().manual_seed(3))
FEWER = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]


def sibling(scale: float = 0.02):
    """The same shapes, other weights; what block 1's MLP gives is multiplied by `scale`."""
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= scale
    model.model.layers[0].mlp.up_proj.weight.data *= 1.01
    return model


def tilted(config: SparsityConfig | None = None, taken: float = 0.9) -> Plan:
    """A plan of the unchanged model that takes most from block 1's MLP."""
    plan = make_plan(tiny("llama"), config or SparsityConfig(0.5, pruner="magnitude"))
    total = sum(layer.size for layer in plan.layers.values())
    mlp = sum(plan.layers[name].size for name in FEWER)
    rest = (0.5 * total - taken * mlp) / (total - mlp)
    layers = {n: replace(x, sparsity=taken if n in FEWER else rest) for n, x in plan.layers.items()}
    return replace(plan, layers=layers)


def found(model) -> dict:
    return model.config.sparsity_config["pruned"]["revalidation"]


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_the_same_plan_pays_where_it_spares_what_matters_and_not_where_it_takes_it(pruner, caplog):
    plan = tilted(SparsityConfig(0.5, pruner=pruner))
    idle, busy = sibling(0.01), sibling(8.0)
    with caplog.at_level(logging.WARNING):
        report = prune(idle, plan, IDS)
        assert not caplog.records
        assert report.revalidation == found(idle) and report.certificate is None
        prune(busy, plan, IDS)
    assert found(idle)["pays"] is True and found(busy)["pays"] is False
    assert "still pays" in verdict(found(idle)) and "harm" in verdict(found(busy))
    assert caplog.messages == [verdict(found(busy))]
    for made in (found(idle), found(busy)):
        gain = made["kl"]["uniform_minus_chosen"]
        assert gain["value"] == pytest.approx(made["kl"]["uniform"] - made["kl"]["chosen"])
        assert made["data"]["sequences"] == 6  # half of the twelve: they are short
    assert json.loads(json.dumps(found(idle))) == found(idle)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "*:8"])
def test_its_numbers_are_those_of_models_pruned_with_the_other_sequences(pruner, pattern):
    """Of one block, whose inputs pruning leaves as they are: there the masks are those that pruning makes."""
    config = SparsityConfig(0.5, pattern=pattern, pruner=pruner, ignore=("model.layers.[12].*",))
    even = make_plan(tiny("llama"), config, IDS)
    steps = {"q": 0.75, "k": 0.25, "v": 0.75, "o": 0.25}
    taken = {name: steps.get(name.rpartition(".")[2].removesuffix("_proj"), 0.5) for name in even.layers}
    parsed = Pattern.parse(pattern)
    plan = replace(
        even,
        layers={n: replace(x, sparsity=taken[n], pattern=str(parsed.at(taken[n]))) for n, x in even.layers.items()},
    )
    chosen, uniform, judged = sibling(), sibling(), sibling()
    prune(judged, plan, IDS)
    prune(chosen, replace(plan, model={}), IDS[:-6])
    prune(uniform, replace(even, model={}), IDS[:-6])
    expected = certify(sibling(), uniform, chosen, IDS[-6:])
    for key in ("uniform", "chosen"):
        assert found(judged)["kl"][key] == pytest.approx(expected["kl"][key], rel=1e-4)
        assert found(judged)["perplexity"][key] == pytest.approx(expected["perplexity"][key], rel=1e-4)


def test_within_noise_it_says_so(caplog):
    plan = tilted(taken=0.502)
    model = sibling(0.5)
    prune(model, plan, IDS)
    gain = found(model)["kl"]["uniform_minus_chosen"]
    assert gain["low"] <= 0 <= gain["high"], gain
    assert found(model)["pays"] is None and "cannot be told" in caplog.text


def test_pruning_is_not_changed_by_it():
    plan = tilted(SparsityConfig(0.5))
    checked, unchecked = sibling(), sibling()
    prune(checked, plan, IDS)
    prune(unchecked, replace(plan, model={}), IDS)
    for (name, one), other in zip(checked.state_dict().items(), unchecked.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert "revalidation" not in unchecked.config.sparsity_config["pruned"]


def test_nothing_to_say_of_the_same_model_a_uniform_plan_or_without_text(caplog):
    same = tiny("llama")
    prune(same, tilted(), IDS)
    even = sibling()
    prune(even, make_plan(tiny("llama"), SparsityConfig(0.5, pruner="magnitude")), IDS)
    assert not caplog.records
    blind = sibling()
    prune(blind, tilted())
    few = sibling()
    prune(few, tilted(), IDS[:3])
    for model in (same, even, blind, few):
        assert "revalidation" not in model.config.sparsity_config["pruned"]
    assert len(caplog.messages) == 2 and all("not checked" in message for message in caplog.messages)


@pytest.mark.parametrize("pattern", ["2:4", "*:8"])
def test_patterns_are_compared_with_their_own_uniform(pattern):
    plan = make_plan(tiny("llama"), SparsityConfig(0.5, pattern=pattern), IDS)
    layers = dict(plan.layers)
    if pattern == "*:8":  # the same number of weights goes, from other blocks
        for block, sparsity in (("0", 0.25), ("1", 0.75)):
            layers |= {
                name: LayerPlan(sparsity, layer.size, f"{round(8 * (1 - sparsity))}:8")
                for name, layer in plan.layers.items()
                if name.startswith(f"model.layers.{block}.")
            }
    model = sibling()
    prune(model, replace(plan, layers=layers), IDS)
    pruned = model.config.sparsity_config["pruned"]
    assert ("revalidation" in pruned) == (pattern == "*:8")


def test_a_streamed_sibling_gets_the_same_verdict_and_leaves_no_masks_behind(tmp_path):
    plan = tilted(SparsityConfig(0.5))
    model = sibling()
    model.save_pretrained(tmp_path / "sibling")
    prune(model, plan, IDS)
    streamed = open_streamed(tmp_path / "sibling")
    prune(streamed, plan, IDS, output_dir=tmp_path / "out")
    assert found(streamed) == found(model) | {"made_on": found(streamed)["made_on"]}
    assert not [file for file in (tmp_path / "out").rglob("*") if "masks" in file.name or "UNFINISHED" in str(file)]
