"""Block reconstruction: zeros stay, the stream behind every block comes closer to the dense one, runs are repeatable."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

from hf_sparsity import SparsityConfig, calibration_batches, demo, evaluate_text, make_plan, prune, text_windows
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.model.layers import find_layers
from hf_sparsity.pruning.reconstruction import BlockReconstruction
from hf_sparsity.streaming import spill
from tests.conftest import Stopped, auto, stop_after, tiny, tiny_batch
from tests.tools import contents, waiting_on_disk

QUICK = BlockReconstruction(epochs=2, lr=0.02)
HALVES = {
    "llama": ["self_attn", "mlp"],
    "gpt2": ["attn", "mlp"],
    "mixtral": ["self_attn", "mlp"],
    "gemma3": ["self_attn", "mlp"],
    "gpt_oss": ["self_attn", "mlp"],
    "falcon": ["self_attention", "mlp"],
    "bloom": ["self_attention", "mlp"],
    "opt": ["block"],  # its fc1 and fc2 are children of the block: none is a half
    "mamba": ["mixer"],
    "t5": ["layer.0", "layer.1"],
}


def batches(name, count=4):
    batch = tiny_batch(name, sequences=count)
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]


def pruned(name, reconstruct=QUICK, *, pruner="magnitude", sparsity=0.6, model=None, data=None, seed=0, **options):
    model = tiny(name) if model is None else model
    data = batches(name) if data is None else data
    plan = make_plan(model, SparsityConfig(sparsity, pruner=pruner, seed=seed))
    prune(model, plan, data, reconstruct=reconstruct, **options)
    return model


def weights_of(model):
    return {name: weight.read().clone() for name, weight in find_layers(model).weights.items()}


def recorded(folder):
    """(what a run into this folder records of the halves of each block, the output to run with)."""
    halves = {}

    def note(record):
        if record["what"] == "reconstructed":
            halves[record["name"]] = record["value"]

    return halves, Output(folder, after_record=note)


@pytest.mark.parametrize("name", HALVES)
def test_zeros_stay_and_survivors_change(name, tmp_path):
    records, output = recorded(tmp_path / "out")
    before, after = pruned(name, None), pruned(name, output_dir=output)
    expected, found = weights_of(before), weights_of(after)
    for layer, weight in found.items():  # magnitude: the masks do not depend on the inputs
        assert torch.equal(weight == 0, expected[layer] == 0), layer
    halves = [record for block in records.values() for record in block]
    assert [record["half"] for record in next(iter(records.values()))] == HALVES[name]
    assert all(record["after"] <= record["before"] for record in halves)
    assert sum(record["after"] < record["before"] for record in halves) > len(halves) / 2
    changed = [layer for layer, weight in found.items() if not torch.equal(weight, expected[layer])]
    assert len(changed) > len(found) / 2
    pruned_layers = {weight.parameter for weight in find_layers(after).weights.values()}
    others = {key: value for key, value in after.state_dict().items() if key not in pruned_layers}
    assert others and all(torch.equal(value, before.state_dict()[key]) for key, value in others.items())
    summary = after.config.sparsity_config["pruned"]["reconstruction"]
    assert summary["options"] == QUICK.to_dict() and summary["improved"] + summary["kept"] == len(halves)
    assert summary["error_after"] < summary["error_before"]


def streams(model, batch):
    """The output of each block."""
    found = []
    hooks = [
        block.module.register_forward_hook(
            lambda _, given, output: found.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        for block in find_layers(model).blocks
    ]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon", "opt"])
def test_the_errors_are_those_of_the_stream_of_the_finished_model(name, tmp_path):
    """Restated with plain hooks: behind each block, on the held-out sequence, dense model against finished model."""
    records, output = recorded(tmp_path / "out")
    model, data = pruned(name, pruner="wanda", output_dir=output), batches(name)
    there, here = streams(tiny(name), data[-1]), streams(model, data[-1])
    for block, dense, mine in zip(find_layers(model).blocks, there, here, strict=True):
        error = float((dense - mine).square().sum() / dense.square().sum())
        assert records[block.name][-1]["after"] == pytest.approx(error, rel=1e-4)
    plain = streams(pruned(name, None, pruner="wanda"), data[-1])
    assert (there[0] - here[0]).square().sum() < (there[0] - plain[0]).square().sum()


def test_steps_that_make_it_worse_are_not_taken(tmp_path):
    wild = BlockReconstruction(epochs=1, lr=1.0)
    records, output = recorded(tmp_path / "out")
    before, after = weights_of(pruned("llama", None)), weights_of(pruned("llama", wild, output_dir=output))
    kept = 0
    for block, halves in records.items():
        for record in halves:
            mine = [layer for layer in after if layer.startswith(f"{block}.{record['half']}.")]
            same = all(torch.equal(after[layer], before[layer]) for layer in mine)
            assert mine and same == (record["after"] == record["before"])
            kept += same
    assert kept


def test_dense_layers_and_ignored_experts_stay_as_they_are():
    model = tiny("mixtral")
    data = batches("mixtral")
    plan = make_plan(model, SparsityConfig(0.5, pruner="wanda", ignore=["model.layers.0.self_attn", "*[[]1]"]))
    dense = weights_of(model)
    prune(model, plan, data, reconstruct=QUICK)
    found = weights_of(model)
    for layer in found:
        assert torch.equal(found[layer], dense[layer]) == (layer not in plan.layers), layer


def test_a_real_model_becomes_better():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = Path(demo.__file__).parent / "model"  # the embedded model with all its blocks
    tokenizer = AutoTokenizer.from_pretrained(whole)
    ids = calibration_batches([text for _, text in demo.texts("calibration")], tokenizer, sequences=8, length=128)
    heldout = text_windows("".join(text for _, text in demo.texts("heldout")), tokenizer, 128)[::200]
    found = []
    for options in (None, BlockReconstruction(epochs=3, lr=0.05)):  # few steps: larger ones
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        prune(model, make_plan(model, SparsityConfig(0.7, pruner="wanda")), ids, reconstruct=options)
        found.append(evaluate_text(model, heldout).perplexity)
    assert found[1] < 0.8 * found[0]


def test_half_precision_is_trained_in_float32():
    """Steps far below bfloat16's resolution add up."""
    model = tiny("llama", torch.bfloat16)
    before = weights_of(pruned("llama", None, model=copy.deepcopy(model)))
    fine = BlockReconstruction(epochs=20, lr=0.001, patience=20)
    after = weights_of(pruned("llama", fine, model=model))
    assert all(weight.dtype == torch.bfloat16 for weight in after.values())
    moved = [(after[layer] != before[layer]).float().mean() for layer in after]
    assert sum(moved) / len(moved) > 0.1
    assert all(torch.equal(after[layer] == 0, before[layer] == 0) for layer in after)


def test_what_is_added_is_seen_under_a_large_stream():
    from hf_sparsity.pruning.half_blocks import adds

    stream, one, other = 1000 * torch.randn(9, 64), torch.randn(9, 64), torch.randn(9, 64)
    stream, one, other = stream.bfloat16(), one.bfloat16(), other.bfloat16()
    assert adds(stream, [one, other], stream + one + other)
    assert not adds(stream / 100, [one, other], stream / 100 + one + 3 * other)
    assert not adds(stream, [one, stream + one + other], stream + one + other)
    assert not adds(None, [one], one) and not adds(stream[:1], [one], one)


def test_the_seed_decides():
    first, again, other = (weights_of(pruned("llama", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    assert not all(torch.equal(first[layer], other[layer]) for layer in first)


def test_padding_does_not_count():
    """An image model's batch keeps its mask; what stands under the padding changes nothing."""
    found = []
    for filler in (5, 9):
        data = batches("llava")
        for batch in data:
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.full((1, 6), filler)], dim=1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, -6:] = 0
        found.append(weights_of(pruned("llava", data=data)))
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_hidden_states_on_disk_and_offloaded_weights_give_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "SMALLEST", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = pruned(name, pruner="wanda").state_dict()
    waiting = waiting_on_disk(model := tiny(name), tmp_path)
    found = pruned(name, pruner="wanda", hidden_limit=0, model=model).state_dict()
    assert {file.rpartition("-")[0] for file in waiting} == {"", "dense", "half"}  # of the walks, and what is recorded
    assert not any(tmp_path.iterdir())
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    model = tiny(name)
    cpu_offload(model, execution_device=torch.device("cpu"))
    pruned(name, pruner="wanda", model=model)
    for path, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            for key, _ in module.named_parameters(recurse=False):
                assert torch.equal(module._hf_hook.weights_map[key], expected[f"{path}.{key}"]), (path, key)


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_streamed_equals_in_memory(name, source, tmp_path):
    expected = pruned(name, pruner="wanda", model=auto(name).from_pretrained(source(name)))
    streamed = open_streamed(source(name), auto_class=auto(name))
    pruned(name, pruner="wanda", model=streamed, output_dir=tmp_path / "out")
    loaded = auto(name).from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in loaded.state_dict().items())
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["sparsity_config"]["pruned"]
    assert stored["reconstruction"] == expected.config.sparsity_config["pruned"]["reconstruction"]


@pytest.mark.parametrize(
    "name, stream, done",
    [("llama", False, 1), ("mixtral", True, 1), pytest.param("gpt2", False, 2, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, stream, done, source, tmp_path):
    def run(folder, options=QUICK):
        model = (
            open_streamed(source(name), auto_class=auto(name)) if stream else auto(name).from_pretrained(source(name))
        )
        pruned(name, options, pruner="wanda", model=model, output_dir=folder)

    run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(Output(tmp_path / "out", after_record=stop_after(done)))
    for options in (None, BlockReconstruction(epochs=3)):
        with pytest.raises(ValueError, match="reconstruct was"):
            run(tmp_path / "out", options)
    records, output = recorded(tmp_path / "out")
    run(output)
    assert len(records) == 3 - done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_other_bits_where_stored_inputs_are_of_no_use(source, tmp_path):
    out = tmp_path / "out"

    def run(output_dir=out, **options):
        pruned("t5", model=auto("t5").from_pretrained(source("t5")), output_dir=output_dir, **options)

    with pytest.raises(Stopped):
        run(output_dir=Output(out, after_record=stop_after(len(find_layers(tiny("t5")).blocks) - 1)))
    with pytest.raises(RuntimeError, match="overwrite=True"):
        run()
    run(overwrite=True)


BAD = {"epochs": (0, 2.5, True), "patience": (0,), "heldout": (0, 0.9), "lr": (0, -1.0, 2.0, "a", float("nan"))}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_bad_options_are_errors(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        BlockReconstruction(**{name: value})


def test_what_cannot_be_reconstructed_is_an_error_that_changes_nothing():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    plan = make_plan(model, SparsityConfig(0.5))
    with pytest.raises(ValueError, match="BlockReconstruction"):
        prune(model, plan, batches("llama"), reconstruct={"epochs": 2})
    with pytest.raises(ValueError, match="at least 2"):
        prune(model, plan, batches("llama", 1), reconstruct=QUICK)
    with pytest.raises(ValueError, match="needs calibration data"):
        prune(model, make_plan(model, SparsityConfig(0.5, pruner="magnitude")), reconstruct=QUICK)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        prune(model, plan, batches("llama"), reconstruct=QUICK)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_repeats_a_block_is_refused():
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[1], model.model.layers[0]])
    plan = make_plan(model, SparsityConfig(0.5))
    with pytest.raises(ValueError, match="several times"):
        prune(model, plan, batches("llama"), reconstruct=QUICK)


def test_where_nothing_is_pruned_nothing_is_trained():
    model, dense = pruned("llama", sparsity=0.0), tiny("llama").state_dict()
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())
