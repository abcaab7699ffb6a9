"""Computing in another precision than the weights are stored in: what is lent, what comes back, what is recorded."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from hf_sparsity import (
    BlockReconstruction,
    Plan,
    Report,
    SparsityConfig,
    evaluate_text,
    make_plan,
    prune,
)
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.plan_file import PlanFile
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.core.stats import GRAM
from hf_sparsity.model import precision
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.precision import compute_dtype, computing, has_instructions, lent_precision
from hf_sparsity.planning.fisher import fisher_information
from hf_sparsity.streaming.first_pass import first_pass
from hf_sparsity.streaming.stream import stream_blocks
from tests.conftest import Stopped, auto, stop_after, tiny, tiny_batch

HALF = torch.bfloat16
KINDS = ["llama", "gpt2", "mixtral", "mamba", "t5", "qwen3_next", "falcon", "llava"]


def batches(name, count=3):
    batch = tiny_batch(name, sequences=count)  # models round pictures to the dtype of their weights
    batch = {key: value.to(HALF).float() if value.is_floating_point() else value for key, value in batch.items()}
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]


def float_twin(model):
    return copy.deepcopy(model).to(torch.float32)


def grams(model, data):
    layers = find_layers(model)
    stream = stream_blocks(model, layers, prepare_batches(model, data), frozenset({GRAM}), rewrites=True)
    return {n: layer.stats.gram.clone() for block in stream for n, layer in block.layers.items() if layer.stats}


@pytest.mark.parametrize("name", KINDS)
def test_statistics_are_those_of_a_float32_copy(name):
    model = tiny(name, HALF)
    expected = grams(float_twin(model), batches(name))
    with computing(model, torch.float32):
        found = grams(model, batches(name))
    assert found.keys() == expected.keys()
    for layer, gram in found.items():
        torch.testing.assert_close(gram, expected[layer], rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {HALF}


class Watched:
    """Notes at each product which blocks hold float32 weights, and what their inputs are in."""

    def __init__(self, model, layers):
        self.most, self.inputs = 0, set()
        for weight in layers.weights.values():
            weight.module.register_forward_pre_hook(self.look)
        self.blocks = [list(block.weights.values()) for block in layers.blocks]

    def look(self, module, args):
        lent = [any(weight.used.dtype == torch.float32 for weight in weights) for weights in self.blocks]
        self.most = max(self.most, sum(lent))
        self.inputs.add(args[0].dtype)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_one_block_at_a_time_is_lent_and_all_come_back(pruner):
    model = tiny("llama", HALF)
    watched = Watched(model, find_layers(model))
    config = SparsityConfig(0.5, allocator="owl", pruner=pruner, compute_dtype="float32")
    plan = make_plan(model, config, batches("llama"))
    report = prune(model, plan, batches("llama"), reconstruct=BlockReconstruction(epochs=1))
    assert watched.most == 1
    assert watched.inputs == {torch.float32}
    assert {tensor.dtype for tensor in [*model.parameters(), *model.buffers()]} == {
        HALF,
        torch.float32,
    }  # rotary tables
    assert {p.dtype for p in model.parameters()} == {HALF}
    assert all(weight.used is weight.stored for weight in find_layers(model).weights.values())
    assert not any("forward" in vars(module) for module in model.modules())
    assert plan.compute_dtype == report.compute_dtype == "float32"
    assert Plan.from_dict(plan.to_dict()).compute_dtype == Report.from_dict(report.to_dict()).compute_dtype == "float32"
    assert Plan.from_dict(plan.to_dict()) == plan


def test_the_next_block_sees_weights_rounded_as_they_are_saved():
    model, data = tiny("llama", HALF), batches("llama")
    config = SparsityConfig(0.5, pruner="sparsegpt", compute_dtype="float32")
    twin = float_twin(model)
    prune(model, make_plan(model, config), data)
    layers = find_layers(twin, ["model.layers.1", "model.layers.2"])
    for weight in layers.weights.values():
        weight.read().copy_(model.get_submodule(weight.name).weight)  # what was saved of the first block
    ignored = SparsityConfig(0.5, pruner="sparsegpt", ignore=["model.layers.0", "model.layers.2"])
    prune(twin, make_plan(twin, ignored), data)
    for name in find_layers(twin, ignored.ignore).weights:
        assert torch.equal(twin.get_submodule(name).weight.to(HALF), model.get_submodule(name).weight), name


def test_evaluation_is_that_of_a_float32_copy():
    model, ids = tiny("llama", HALF), tiny_batch("llama", 4)["input_ids"]
    dense = tiny("llama", HALF)
    prune(model, make_plan(model, SparsityConfig(0.5, pruner="magnitude")))
    found = evaluate_text(model, ids, dense, compute_dtype="float32")
    assert found == evaluate_text(float_twin(model), ids, float_twin(dense))
    assert found != evaluate_text(model, ids, dense, compute_dtype="model")
    assert {p.dtype for p in (*model.parameters(), *dense.parameters())} == {HALF}


def test_gradients_and_races_compute_so_too():
    model, data = tiny("llama", HALF), [{"input_ids": row[None]} for row in tiny_batch("llama", 8)["input_ids"]]
    twin = float_twin(model)
    expected = fisher_information(twin, find_layers(twin), data)
    with computing(model, torch.float32):
        found = fisher_information(model, find_layers(model), data)
    assert found == pytest.approx(expected, rel=1e-3)
    watched = Watched(model, find_layers(model))
    race = {"name": "race", "candidates": ("owl",), "slices": (48,), "descent": 1}
    plan = make_plan(model, SparsityConfig(0.5, allocator=race, compute_dtype="float32"), data)
    assert watched.inputs == {torch.float32}
    assert plan.chosen["certificate"]
    assert {p.dtype for p in model.parameters()} == {HALF}


def test_streamed_gives_the_bits_of_memory(source, tmp_path):
    folder, data = source("llama", dtype=HALF), batches("llama")
    config = SparsityConfig(0.5, allocator="owl", pruner="sparsegpt", compute_dtype="float32")
    model, streamed = auto("llama").from_pretrained(folder), open_streamed(folder)
    prune(model, make_plan(model, config, data), data)
    prune(streamed, make_plan(streamed, config, data), data, output_dir=tmp_path / "out")
    loaded = auto("llama").from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.dtype == HALF


def test_a_run_goes_on_with_the_same_only(source, tmp_path):
    def run(output, computes="float32"):
        model = auto("llama").from_pretrained(source("llama", dtype=HALF))
        config = SparsityConfig(0.5, pruner="sparsegpt", compute_dtype=computes)
        prune(model, make_plan(model, config, output_dir=output), batches("llama"), output_dir=output)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(Output(tmp_path / "out", after_record=stop_after(2)))
    with pytest.raises(ValueError, match='compute_dtype was "float32", now "bfloat16"'):
        run(tmp_path / "out", "model")
    resumed = run(tmp_path / "out")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(ValueError, match=r"of a run with another .*compute_dtype"):
        run(tmp_path / "out", "model")


def test_a_plan_is_of_one_precision(source, tmp_path):
    def run(computes):
        output = PlanFile(tmp_path / "plan.json")
        model = auto("llama").from_pretrained(source("llama", dtype=HALF))
        config = SparsityConfig(0.5, allocator="owl", compute_dtype=computes)
        output.save(make_plan(model, config, batches("llama"), output_dir=output))
        return output

    assert not run("float32").is_complete
    assert run("float32").is_complete
    with pytest.raises(ValueError, match="compute_dtype"):
        run("model")


def test_a_float32_model_has_no_choice_and_records_none():
    model = tiny("llama")
    plan = make_plan(model, SparsityConfig(0.5, allocator="owl"), batches("llama"))
    report = prune(model, plan, batches("llama"))
    assert compute_dtype(model) == torch.float32
    assert "compute_dtype" not in {*plan.to_dict(), *plan.config, *report.to_dict()}


@pytest.mark.parametrize(
    ("has", "expected"), [({}, torch.float32), ({"amx_bf16": True}, HALF), ({"avx512_bf16": True}, HALF)]
)
def test_auto_asks_torch_for_instructions(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    precision._cpu_has.cache_clear()
    assert compute_dtype(tiny("llama", HALF)) == expected
    assert compute_dtype(tiny("llama", HALF), "model") == HALF
    assert compute_dtype(tiny("llama", HALF), "float32") == torch.float32
    assert has_instructions(torch.float32, torch.device("cpu"))
    precision._cpu_has.cache_clear()


def test_a_wrong_choice_is_named():
    with pytest.raises(ValueError, match="compute_dtype='fp32': one of auto, float32"):
        SparsityConfig(0.5, compute_dtype="fp32")
    with pytest.raises(ValueError, match="compute_dtype='fp32'"):
        evaluate_text(tiny("llama"), tiny_batch("llama")["input_ids"], compute_dtype="fp32")


def test_outside_of_computing_nothing_is_lent():
    model = tiny("llama", HALF)
    block = find_layers(model).blocks[0]
    with lent_precision(block.module):
        assert {p.dtype for p in block.module.parameters()} == {HALF}


def test_the_first_pass_lets_go_of_each_block():
    model = tiny("llama", HALF)
    layers, data = find_layers(model), prepare_batches(model, batches("llama"))
    shapes = {weight.shape for weight in layers.weights.values()}

    def matrices():
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return {t.untyped_storage().data_ptr() for t in found if t.dtype == torch.float32 and tuple(t.shape) in shapes}

    counts, before = [], len(matrices())
    for block in layers.blocks:
        block.module.mlp.register_forward_pre_hook(lambda *_: counts.append(len(matrices()) - before))
    with computing(model, torch.float32):
        first_pass(model, layers, data[:1])
    assert counts == [len(layers.blocks[0].weights)] * len(layers.blocks)
