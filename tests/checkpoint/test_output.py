"""Pruning into a folder: streamed or from memory, interrupted and gone on with, it ends with the same bits."""

from __future__ import annotations

import json
import os
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity import Plan, Report, SparseModel, SparsityConfig, make_plan, measure_sparsity, prune
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.files import MARKER
from hf_sparsity.model.layers import find_layers
from hf_sparsity.streaming import spill
from tests.conftest import Stopped, auto, stop_after, tiny, tiny_batch
from tests.tools import contents, mostly_slow, waiting_on_disk

KINDS = ["llama", "gemma3", "qwen2_window", "bloom", "mixtral", "gpt_oss", "gpt2", "deepseek_v3", "mamba", "t5"]
PAIRS = [(name, pruner) for name in KINDS for pruner in ("wanda", "sparsegpt")]
# One of each kind of block: plain, of experts, transposed weights, with an encoder's output, with a cache of its own.
QUICK = [("llama", "sparsegpt"), ("mixtral", "wanda"), ("gpt2", "sparsegpt"), ("t5", "wanda"), ("mamba", "wanda")]


def batches(name, count=3):
    batch = tiny_batch(name, sequences=count)
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(count)]


@pytest.mark.parametrize(("name", "pruner"), mostly_slow(PAIRS, QUICK))
def test_streamed_equals_in_memory(name, pruner, source, tmp_path):
    config = SparsityConfig(0.5, allocator="owl", pruner=pruner)
    model = auto(name).from_pretrained(source(name))
    plan = make_plan(model, config, batches(name))
    report = prune(model, plan, batches(name))
    streamed = open_streamed(source(name), auto_class=auto(name))
    again = make_plan(streamed, config, batches(name))
    assert again.to_dict()["layers"] == plan.to_dict()["layers"]
    made = prune(streamed, again, batches(name), output_dir=tmp_path / "out")
    assert {n: r.zeros for n, r in made.layers.items()} == {n: r.zeros for n, r in report.layers.items()}
    assert not (tmp_path / "out" / MARKER).exists()
    loaded, info = auto(name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    names = {n for file in source(name).glob("*.safetensors") for n in load_file(file)}
    assert {n for file in (tmp_path / "out").glob("*.safetensors") for n in load_file(file)} == names
    # The streamed model now reads what was written.
    batch = batches(name)[0]
    with torch.no_grad():
        assert torch.equal(streamed(**batch, use_cache=False)[0], model(**batch, use_cache=False)[0])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_folder_from_memory_equals_save_pretrained(name, source, tmp_path):
    config = SparsityConfig(0.6, pruner="wanda")
    model = auto(name).from_pretrained(source(name))
    plan = make_plan(model, config)
    report = prune(model, plan, batches(name), output_dir=tmp_path / "out")
    assert measure_sparsity(auto(name).from_pretrained(tmp_path / "out")).sparsity == report.sparsity
    model.save_pretrained(tmp_path / "saved")
    expected = load_file(tmp_path / "saved" / "model.safetensors")
    written = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "saved")]
    assert configs[0] == configs[1]
    assert Plan.load(tmp_path / "out") == plan and Report.load(tmp_path / "out" / "sparsity_report.json")
    total = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(value.numel() * value.element_size() for value in expected.values())


@pytest.mark.parametrize(
    "name, stream, done",
    mostly_slow(
        [("llama", False, 1), ("llama", True, 2), ("mixtral", False, 2), ("mixtral", True, 1), ("gpt2", False, 1)]
        + [(name, True, 2) for name in ("gemma3", "bloom", "gpt_oss", "t5", "qwen3_next")],
        [("llama", True, 2), ("mixtral", False, 2), ("t5", True, 2)],
    ),
)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, stream, done, source, tmp_path):
    config = SparsityConfig(0.5, allocator="owl", pruner="sparsegpt")

    def run(folder):
        model = (
            open_streamed(source(name), auto_class=auto(name)) if stream else auto(name).from_pretrained(source(name))
        )
        plan = make_plan(model, config, batches(name), output_dir=folder)
        return prune(model, plan, batches(name), output_dir=folder)

    run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(Output(tmp_path / "out", after_record=stop_after(done)))
    assert (tmp_path / "out" / MARKER).is_dir() and not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="unfinished"):
        SparseModel.from_pretrained(tmp_path / "out")
    records = []
    run(Output(tmp_path / "out", after_record=records.append))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    solved = [record["name"] for record in records if record["what"] == "block"]
    assert len(solved) == len([b for b in find_layers(tiny(name)).blocks if b.weights]) - done


def passes_through(model):
    """Counts the passes through each block from now on: [a growing count for each]."""
    counts = [0] * len(find_layers(model).blocks)

    def count(number):
        counts[number] += 1

    for number, block in enumerate(find_layers(model).blocks):
        linear = next(module for module in block.module.modules() if isinstance(module, torch.nn.Linear))
        linear.register_forward_hook(lambda *_, number=number: count(number))
    return counts


@pytest.mark.parametrize(("name", "passes"), [("llama", 1), ("t5", 1 + 3)])
def test_stored_inputs_are_used_where_the_architecture_allows_it(name, passes, source, tmp_path):
    """A decoder of T5 looks at the encoder's output and at its first block's position bias; a Llama at neither.

    Which it is, is tried with the first of three batches.
    """
    model = auto(name).from_pretrained(source(name))
    plan = make_plan(model, SparsityConfig(0.5))
    output = Output(tmp_path / name, after_record=stop_after(len(find_layers(model).blocks) - 1))
    with pytest.raises(Stopped):
        prune(model, plan, batches(name), output_dir=output)
    model = auto(name).from_pretrained(source(name))
    counts = passes_through(model)
    prune(model, plan, batches(name), output_dir=tmp_path / name)
    assert counts[0] == passes and counts[-1] >= 3


def test_other_arguments_are_refused_and_named(source, tmp_path):
    model = auto("llama").from_pretrained(source("llama"))
    out = tmp_path / "out"
    config = SparsityConfig(0.5, allocator="owl")

    def run(config, data, folder=out, loaded=None, **options):
        loaded = loaded or auto("llama").from_pretrained(source("llama"))
        plan = make_plan(loaded, config, data, output_dir=folder, **options)
        return prune(loaded, plan, data, output_dir=folder)

    with pytest.raises(Stopped):
        run(config, batches("llama"), Output(out, after_record=stop_after(1)))
    before = contents(out)
    with pytest.raises(ValueError, match="data was"):
        run(config, batches("llama", 2))
    with pytest.raises(ValueError, match="config was"):
        run(SparsityConfig(0.6, allocator="owl"), batches("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="model was"):
        run(config, batches("llama"), loaded=model)
    assert contents(out) == before
    run(SparsityConfig(0.6, allocator="owl"), batches("llama"), overwrite=True)
    assert not (out / MARKER).exists()
    with pytest.raises(ValueError, match="overwrite"):
        run(config, batches("llama"))
    run(config, batches("llama"), overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="choose another"):
            run(config, batches("llama"), tmp_path / "other", overwrite=overwrite)
    assert [f.name for f in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_bad_input_leaves_no_folder(source, tmp_path):
    model = auto("llama").from_pretrained(source("llama"))
    with pytest.raises(ValueError, match="calibration data"):
        make_plan(model, SparsityConfig(0.5, allocator="owl"), output_dir=tmp_path / "out")
    plan = make_plan(model, SparsityConfig(0.5))
    with pytest.raises(ValueError, match="empty"):
        prune(model, plan, [], output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="output_dir"):
        prune(open_streamed(source("llama")), plan, batches("llama"))
    with pytest.raises(ValueError, match="output_dir"):
        SparseModel.from_pretrained(source("llama"), sparsity_config=SparsityConfig(0.5), offload="stream")
    with pytest.raises(ValueError, match="unknown"):
        SparseModel.from_pretrained(source("llama"), sparsity_config=SparsityConfig(0.5), offload="disk")
    assert not (tmp_path / "out").exists()


def test_from_pretrained_streams(source, tmp_path):
    config = SparsityConfig(0.5, allocator="owl")
    ids = torch.cat([b["input_ids"] for b in batches("llama")])
    model = SparseModel.from_pretrained(
        source("llama"), sparsity_config=config, calibration_data=ids, offload="stream", output_dir=tmp_path / "out"
    )
    loaded = SparseModel.from_pretrained(tmp_path / "out")
    assert loaded.config.sparsity_config == model.config.sparsity_config
    assert measure_sparsity(loaded).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("allocator", ["msp", "mrp", "alphapruning"])
def test_an_interrupted_planning_goes_on_to_the_same_plan(allocator, source, tmp_path):
    """Each evaluated candidate, each repeated measurement and each block's spectrum is remembered."""
    given = {"name": "msp", "generations": 2, "population": 4, "parents": 2} if allocator == "msp" else allocator
    config = SparsityConfig(0.5, allocator=given)

    def plan(output):
        model = auto("llama").from_pretrained(source("llama"))
        return make_plan(model, config, batches("llama"), output_dir=output)

    whole = plan(tmp_path / "whole")
    made = []

    def limited(record):
        made.append((record["what"], record["name"]))
        if len(made) in (2, 4, 6):
            raise Stopped

    stops = 0
    while True:
        try:
            found = plan(Output(tmp_path / "out", after_record=limited))
            break
        except Stopped:
            stops += 1
    assert stops >= 1
    assert found.to_dict() == whole.to_dict()
    assert len(made) == len(set(made))  # nothing was computed twice


def test_a_record_cut_short_counts_as_not_written(source, tmp_path):
    model = auto("llama").from_pretrained(source("llama"))
    plan = make_plan(model, SparsityConfig(0.5))
    prune(model, plan, batches("llama"), output_dir=tmp_path / "whole")
    model = auto("llama").from_pretrained(source("llama"))
    with pytest.raises(Stopped):
        output = Output(tmp_path / "out", after_record=stop_after(2))
        prune(model, plan, batches("llama"), output_dir=output)
    journal = tmp_path / "out" / MARKER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    prune(auto("llama").from_pretrained(source("llama")), plan, batches("llama"), output_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_killed_while_it_takes_the_marker_away(source, tmp_path):
    """What it leaves is complete; an output whose record is still there is finished again."""
    model = auto("llama").from_pretrained(source("llama"))
    plan = make_plan(model, SparsityConfig(0.5))
    prune(model, plan, batches("llama"), output_dir=tmp_path / "whole")

    output = Output(tmp_path / "out", after_record=stop_after(1, "complete"))
    with pytest.raises(Stopped):
        prune(auto("llama").from_pretrained(source("llama")), plan, batches("llama"), output_dir=output)
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / MARKER).exists()
    prune(auto("llama").from_pretrained(source("llama")), plan, batches("llama"), output_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    (tmp_path / "out" / MARKER).mkdir()  # all but the last step
    prune(auto("llama").from_pretrained(source("llama")), plan, batches("llama"), output_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not (tmp_path / "out" / MARKER).exists()


def test_hidden_states_beyond_the_limit_wait_on_disk(source, tmp_path, monkeypatch):
    (place := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(spill, "SMALLEST", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for name in ("llama", "mixtral", "t5"):
        config = SparsityConfig(0.5, allocator="owl")
        found = {}
        for limit in (None, 0, 20_000):
            model = auto(name).from_pretrained(source(name))
            waiting = waiting_on_disk(model, place)
            plan = make_plan(model, config, batches(name), hidden_limit=limit)
            prune(model, plan, batches(name), hidden_limit=limit)
            found[limit] = model.state_dict()
            assert bool(waiting) == (limit is not None)
            assert not any(place.iterdir())
        for limit in (0, 20_000):
            assert all(torch.equal(found[limit][key], found[None][key]) for key in found[None]), (name, limit)


def test_a_full_disk_is_an_error_that_loses_nothing(source, tmp_path, monkeypatch):
    from hf_sparsity.checkpoint import atomic

    save, left = atomic.save_file, [9]

    def full(tensors, path, metadata=None):
        if not left[0]:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        left[0] -= 1
        save(tensors, path, metadata=metadata)

    model = auto("llama").from_pretrained(source("llama"))
    plan = make_plan(model, SparsityConfig(0.5))
    prune(model, plan, batches("llama"), output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "save_file", full)
        model = auto("llama").from_pretrained(source("llama"))
        with pytest.raises(OSError, match="make room"):
            prune(model, plan, batches("llama"), output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.partial"))
    prune(auto("llama").from_pretrained(source("llama")), plan, batches("llama"), output_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_safetensors_leaves_when_killed_goes(tmp_path, monkeypatch):
    from hf_sparsity.checkpoint import atomic

    def die(tensors, path, metadata=None):
        (path.parent / ".tmpAbCdEf").write_bytes(b"half")
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "save_file", die)
        if (child := os.fork()) == 0:
            atomic.write_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list(tmp_path.rglob(".tmp*"))
    atomic.write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["a"].sum() == 2


def test_a_run_with_nothing_left_computes_nothing(source, tmp_path):
    model = auto("llama").from_pretrained(source("llama"))
    plan = make_plan(model, SparsityConfig(0.5))

    with pytest.raises(Stopped):
        output = Output(tmp_path / "out", after_record=stop_after(len(find_layers(model).blocks)))
        prune(model, plan, batches("llama"), output_dir=output)
    model = auto("llama").from_pretrained(source("llama"))
    counts = passes_through(model)
    prune(model, plan, batches("llama"), output_dir=tmp_path / "out")
    assert not any(counts)
    assert not (tmp_path / "out" / MARKER).exists()


def test_overwriting_a_packed_model_leaves_nothing_of_it(source, tmp_path):
    from hf_sparsity import pack

    model = auto("llama").from_pretrained(source("llama"))
    plan = make_plan(model, SparsityConfig(0.5))
    prune(model, plan, batches("llama"), output_dir=tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    model = auto("llama").from_pretrained(source("llama"))
    prune(model, plan, batches("llama"), output_dir=tmp_path / "packed", overwrite=True)
    assert contents(tmp_path / "packed") == contents(tmp_path / "dense")
