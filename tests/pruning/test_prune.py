"""make_plan and prune: every sensible combination, the report, and bad input."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from hf_sparsity import Plan, SparsityConfig, make_plan, prune
from hf_sparsity.algorithm import Allocator, Pruner
from hf_sparsity.allocators import ALLOCATORS
from hf_sparsity.pruners import PRUNERS
from tests.conftest import tiny, tiny_batch
from tests.tools import mostly_slow

IDS = tiny_batch("llama", sequences=4, tokens=32)["input_ids"]
QUICK = {"msp": {"name": "msp", "population": 4, "generations": 2, "parents": 2}, "mrp": {"name": "mrp", "growth": 0.1}}
# The contracts make allocators and pruners independent: every allocator with one pruner and every pruner with one
# allocator say what all pairs would.
ROW_AND_COLUMN = [(name, "wanda") for name in ALLOCATORS] + [("owl", name) for name in PRUNERS if name != "wanda"]


def quick(name):
    return QUICK.get(name, name)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("allocator", "pruner"), ROW_AND_COLUMN)
def test_every_allocator_and_every_pruner(allocator, pruner):
    model = tiny("llama")
    before = snapshot(model)
    config = SparsityConfig(0.6, allocator=quick(allocator), pruner=pruner)
    plan = make_plan(model, config, IDS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "planning changed the model"
    assert all(not m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert plan.sparsity == pytest.approx(0.6, abs=1e-6)
    report = prune(model, plan, IDS)
    assert report.sparsity == pytest.approx(0.6, abs=0.012)
    for name, layer in report.layers.items():
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == layer.zeros
        assert layer.sparsity == pytest.approx(plan.layers[name].sparsity, abs=1 / weight.shape[1] + 0.005)
    for key in before:  # norms, embeddings and the head are as they were
        if key.removesuffix(".weight") not in plan.layers:
            assert torch.equal(model.state_dict()[key], before[key])
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize(
    ("allocator", "pruner"),
    mostly_slow(ROW_AND_COLUMN, [("mrp", "wanda"), ("atp", "wanda"), *(("owl", name) for name in PRUNERS)]),
)
def test_mixed_groups_with_every_allocator(allocator, pruner):
    model = tiny("llama")
    config = SparsityConfig(0.55, pattern="*:8", allocator=quick(allocator), pruner=pruner)
    plan = make_plan(model, config, IDS)
    prune(model, plan, IDS)
    step = max(x.size for x in plan.layers.values()) / 8 / sum(x.size for x in plan.layers.values())
    assert 0.55 - 1e-9 <= plan.sparsity <= 0.55 + step
    for name, layer in plan.layers.items():
        kept = 8 if layer.pattern == "unstructured" else int(layer.pattern.split(":")[0])
        groups = (model.get_submodule(name).weight != 0).reshape(-1, 8).sum(dim=1)
        assert int(groups.max()) <= kept == round(8 * (1 - layer.sparsity))


@pytest.mark.parametrize("pruner", PRUNERS)
def test_fixed_groups(pruner):
    model = tiny("llama")
    plan = make_plan(model, SparsityConfig(pattern="2:4", pruner=pruner), IDS)
    prune(model, plan, IDS)
    for name in plan.layers:
        assert ((model.get_submodule(name).weight != 0).reshape(-1, 4).sum(dim=1) == 2).all()


@pytest.mark.parametrize(
    ("allocator", "pruner"), [("owl", name) for name in PRUNERS] + [("uniform", "wanda"), ("alphapruning", "wanda")]
)
def test_rows_over_layers(allocator, pruner):
    model = tiny("llama")
    plan = make_plan(model, SparsityConfig(0.6, allocator=allocator, row_allocator="trim", pruner=pruner), IDS)
    report = prune(model, plan, IDS)
    assert report.sparsity == pytest.approx(0.6, abs=0.012)
    if pruner != "sparsegpt":
        rows = (model.model.layers[0].mlp.up_proj.weight == 0).sum(dim=1)
        assert rows.min() < rows.max(), "rows of one layer should differ"


def test_a_block_loop_never_leaves_a_dense_layer_in_a_routed_model():
    model = tiny("qwen3_moe")
    plan = make_plan(model, SparsityConfig(0.5, allocator="owl"), [tiny_batch("qwen3_moe")])
    report = prune(model, plan, [tiny_batch("qwen3_moe")])
    assert all(x.zeros > 0 for x in report.layers.values())
    starved = {n: x for n, x in report.layers.items() if x.tokens is not None and x.tokens < 16}
    assert starved and all("magnitude" in x.note for x in starved.values())
    name, layer = next((n, x) for n, x in starved.items() if x.tokens == 0 or x.note)
    parameter, expert = name.split("[")
    module, attribute = parameter.rsplit(".", 1)
    pruned = getattr(model.get_submodule(module), attribute)[int(expert[:-1])]
    dense = getattr(tiny("qwen3_moe").get_submodule(module), attribute)[int(expert[:-1])]
    count = int(dense.shape[1] * layer.planned)
    assert torch.equal(
        (pruned == 0), torch.zeros_like(pruned, dtype=torch.bool).scatter_(1, dense.abs().argsort(1)[:, :count], True)
    )


def test_weight_only_methods_need_no_data_and_no_forward():
    model = tiny("llama")
    model.forward = None  # a forward pass would raise
    plan = make_plan(model, SparsityConfig(0.5, allocator="alphapruning", pruner="magnitude"))
    report = prune(model, plan)
    assert report.sparsity == pytest.approx(0.5, abs=0.01) and plan.data is None


def test_same_seed_same_plan_same_weights():
    def run():
        model = tiny("llama")
        plan = make_plan(model, SparsityConfig(0.6, allocator=quick("msp"), seed=3), IDS)
        prune(model, plan, IDS)
        return plan, snapshot(model)

    (first, a), (second, b) = run(), run()
    assert first == second
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_plan_lives_in_config_json_without_our_package(tmp_path):
    import subprocess
    import sys

    model = tiny("llama")
    plan = make_plan(model, SparsityConfig(0.5, allocator="owl"), IDS)
    report = prune(model, plan, IDS)
    model.save_pretrained(tmp_path / "a")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'a')!r}); m.save_pretrained({str(tmp_path / 'b')!r});"
        "assert 'hf_sparsity' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    stored = json.loads((tmp_path / "b" / "config.json").read_text())["sparsity_config"]
    assert Plan.from_dict(stored) == plan == Plan.load(tmp_path / "b")
    assert stored["pruned"]["sparsity"] == report.sparsity
    assert {"layers", "weights"} <= set(stored["model"]) and stored["data"]["sha256"] and stored["config"]["seed"] == 0
    assert stored["versions"]["torch"]


@dataclass(frozen=True)
class Halves(Allocator):
    """An allocator from outside the package."""

    name = "halves"

    def assign(self, measures, sizes, target, *, group=None, probe=None):
        names = [n for block in measures for n in block]
        return {n: 0.3 if i < len(names) // 2 else 0.7 for i, n in enumerate(names)}


@dataclass(frozen=True)
class FirstColumns(Pruner):
    """A pruner from outside the package."""

    name = "first-columns"

    def scores(self, layer):
        return torch.arange(layer.weight.shape[1]).expand_as(layer.weight).float()


def test_algorithms_from_outside():
    model = tiny("llama")
    plan = make_plan(model, SparsityConfig(0.5, allocator=Halves(), pruner=FirstColumns()))
    prune(model, plan)
    assert plan.config["pruner"] == {"name": "first-columns"}
    weight = model.model.layers[2].mlp.up_proj.weight
    zeros = int(64 * plan.layers["model.layers.2.mlp.up_proj"].sparsity)
    assert (weight[:, :zeros] == 0).all() and (weight[:, zeros:] != 0).all()
    with pytest.raises(ValueError, match="first-columns"):
        prune(tiny("llama"), Plan.from_dict(plan.to_dict()))


def test_bad_input_changes_nothing():
    model = tiny("llama")
    before = snapshot(model)
    plan = make_plan(model, SparsityConfig(0.5), IDS)
    name = "model.layers.0.mlp.up_proj"
    edited = replace(plan, layers={**plan.layers, name: replace(plan.layers[name], sparsity=0.9)})
    other = make_plan(tiny("gpt2"), SparsityConfig(0.5), tiny_batch("gpt2")["input_ids"])
    resized = replace(plan, layers={**plan.layers, name: replace(plan.layers[name], size=17)})
    for bad, message in ((edited, "target"), (other, "another model"), (resized, "another model")):
        with pytest.raises(ValueError, match=message):
            prune(model, bad, IDS)
    for batches, message in (
        (None, "calibration data"),
        (IDS[:0], "empty"),
        (IDS[:, :1], "at least 2"),
        (IDS + 1000, "vocabulary"),
        (IDS.float(), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, plan, batches)
        with pytest.raises(ValueError, match=message):
            make_plan(model, SparsityConfig(0.5, allocator="owl"), batches)
    with pytest.raises(ValueError, match="does not divide"):
        make_plan(model, SparsityConfig(pattern="2:5"), IDS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj has NaN"):
        prune(model, plan, IDS)
    assert torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )


def test_activations_that_overflow_are_an_error_before_anything_is_changed():
    model = tiny("llama")
    model.model.embed_tokens.weight.data[5:60] = float("inf")
    before = snapshot(model)
    plan = make_plan(tiny("llama"), SparsityConfig(0.5), IDS)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune(model, plan, IDS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny("llama", dtype)
    for pruner in PRUNERS:
        model = tiny("llama", dtype)
        report = prune(model, make_plan(model, SparsityConfig(0.5, allocator="owl", pruner=pruner), IDS), IDS)
        assert report.sparsity == pytest.approx(0.5, abs=0.03)
        assert all(p.dtype == dtype for p in model.parameters())
