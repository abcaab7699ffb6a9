"""`refit`: the zeros of a sparse model, or of masks alone, get the best weights; streamed, resumed, packed, by command."""

from __future__ import annotations

import json

import pytest
import torch

from hf_sparsity import Output, Plan, Report, SparsityConfig, make_card, make_plan, open_streamed, prune, refit, verify
from hf_sparsity.cli.main import main
from hf_sparsity.model.layers import find_layers
from tests.conftest import Stopped, auto, stop_after, tiny, tiny_batch
from tests.tools import contents


def batches_of(architecture):
    batch = tiny_batch(architecture, sequences=6)
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(6)]


@pytest.fixture
def folders(tmp_path):
    """`folders(architecture, ...)`: the dense folder, the sparse one, and the calibration batches."""

    def make(architecture="llama", config=None, **options):
        dense = tiny(architecture)
        dense.save_pretrained(tmp_path / "dense")
        batches = batches_of(architecture)
        plan = make_plan(dense, config or SparsityConfig(0.5), batches)
        prune(dense, plan, batches, output_dir=Output(tmp_path / "sparse", **options))
        return tmp_path / "dense", tmp_path / "sparse", batches

    return make


def load(folder, architecture="llama"):
    return auto(architecture).from_pretrained(folder, dtype=torch.float32)


def zeros(model):
    return {name: weight.read() == 0 for name, weight in find_layers(model).weights.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_folder_gets_better_weights_for_its_zeros(folders, architecture):
    dense, sparse, batches = folders(architecture, SparsityConfig(0.5, allocator="owl"))
    model = load(dense, architecture)
    report = refit(model, sparse, batches)
    before, after = zeros(load(sparse, architecture)), zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    layers = [layer for name, layer in report.layers.items() if ".0." in name and not layer.note]
    assert layers and all(layer.error < 1.05 * layer.error_before_refit for layer in layers)
    assert sum(layer.error for layer in layers) < 0.9 * sum(layer.error_before_refit for layer in layers)
    stored = Plan.from_dict(model.config.sparsity_config)
    assert stored.config["refit"] is True and stored.config["allocator"]["name"] == "owl"
    assert stored.layers == Plan.load(sparse).layers


def test_streamed_and_packed_it_is_the_same(folders, tmp_path):
    dense, sparse, batches = folders(layout="bitmask")
    refit(load(dense), sparse, batches, output_dir=tmp_path / "memory")
    refit(open_streamed(dense), sparse, batches, output_dir=tmp_path / "streamed", hidden_limit=0)
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")
    assert verify(tmp_path / "streamed", against=dense).ok


def test_an_interrupted_refit_goes_on_but_not_with_another_folder(folders, tmp_path):
    dense, sparse, batches = folders()
    refit(load(dense), sparse, batches, output_dir=tmp_path / "whole")
    with pytest.raises(Stopped):
        refit(load(dense), sparse, batches, output_dir=Output(tmp_path / "out", after_record=stop_after(1)))
    other = load(dense)
    plan = make_plan(other, SparsityConfig(0.5, pruner="magnitude"), batches)
    prune(other, plan, batches)
    with pytest.raises(ValueError, match="other arguments"):
        refit(load(dense), other, batches, output_dir=tmp_path / "out")
    refit(load(dense), sparse, batches, output_dir=tmp_path / "out")
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_model_that_others_pruned_has_a_plan_made_of_its_zeros(folders, tmp_path):
    dense, sparse, batches = folders(config=SparsityConfig(pattern="2:4"))
    foreign = load(sparse)
    del foreign.config.sparsity_config
    foreign.save_pretrained(tmp_path / "foreign")
    refit(load(dense), tmp_path / "foreign", batches, refine="swaps", output_dir=tmp_path / "out")
    plan = Plan.load(tmp_path / "out")
    assert plan.config["pattern"] == "2:4" and plan.config["pruner"] is None and plan.config["refine"] == "swaps"
    found = verify(tmp_path / "out", against=dense)
    assert found.ok, found.failed
    groups = [(z.unflatten(1, (-1, 4)).sum(2) == 2).all() for z in zeros(load(tmp_path / "out")).values()]
    assert all(groups)
    report = Report.load(tmp_path / "out/sparsity_report.json")
    assert sum(layer.swapped for layer in report.layers.values()) > 0
    card = str(make_card(tmp_path / "out"))
    assert (
        "hf-sparsity refit SPARSE_MODEL --dense BASE_MODEL --refine=swaps" in card
        and "The zeros were there before" in card
    )


def test_masks_alone_are_enough(folders):
    dense, sparse, batches = folders()
    masks = {name: ~mask for name, mask in zeros(load(sparse)).items()}
    by_folder, by_masks = load(dense), load(dense)
    refit(by_folder, sparse, batches)
    report = refit(by_masks, masks, batches)
    ours, theirs = dict(by_folder.named_parameters()), dict(by_masks.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "Wanda's weights are the dense ones, masked"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    some = {name: mask for name, mask in masks.items() if "mlp" in name}
    assert all(x.zeros == 0 for n, x in refit(load(dense), some, batches).layers.items() if "mlp" not in n)


def test_what_does_not_fit_is_refused_before_any_work(folders):
    dense, sparse, batches = folders()
    model = load(dense)
    with pytest.raises(ValueError, match="has no zeros"):
        refit(model, dense, batches)
    with pytest.raises(ValueError, match="pass batches"):
        refit(model, sparse, None)
    with pytest.raises(ValueError, match="refine='swap'"):
        refit(model, sparse, batches, refine="swap")
    with pytest.raises(ValueError, match="other layers"):
        refit(tiny("gpt2"), load(sparse), batches)
    with pytest.raises(ValueError, match="bool tensor"):
        refit(model, {next(iter(zeros(model))): torch.ones(2, 2)}, batches)
    with pytest.raises(ValueError, match="does not have, such as 'x'"):
        refit(model, {"x": torch.ones(2, 2, dtype=torch.bool)}, batches)
    other = load(sparse)
    with torch.no_grad():
        other.model.layers[1].input_layernorm.weight.mul_(2)
    with pytest.raises(ValueError, match=r"input_layernorm\.weight of the sparse model is not the dense"):
        refit(model, other, batches)
    trained = load(sparse)
    trained.config.sparsity_config = {**trained.config.sparsity_config, "recovered": {"method": "lora"}}
    with pytest.raises(ValueError, match="trained after it was pruned"):
        refit(model, trained, batches)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), load(dense).parameters(), strict=True))


def test_the_command(tmp_path, capsys):
    small = ["--sequences", "4", "--length", "64"]
    assert main(["prune", "demo", "--sparsity", "0.6", "--output", str(tmp_path / "sparse"), *small]) == 0
    line = ["refit", str(tmp_path / "sparse"), "--dense", "demo", "--output", str(tmp_path / "out"), *small]
    capsys.readouterr()
    assert main([*line, "--json", "--stream"]) == 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["after"] < 0.9 * error["before"]
    assert main([*line, "--stream"]) == 0 and "complete already" in capsys.readouterr().out
    assert main(["card", str(tmp_path / "out")]) == 0
    assert "hf-sparsity refit SPARSE_MODEL --dense BASE_MODEL" in (tmp_path / "out/README.md").read_text()


def test_the_embedded_model_by_its_name_has_no_zeros(tmp_path, capsys):
    small = ["--sequences", "4", "--length", "32", "--output", str(tmp_path / "out")]
    assert main(["refit", "demo", "--dense", "demo", *small]) == 2
    assert "has no zeros: prune it first" in capsys.readouterr().err and not (tmp_path / "out").exists()
