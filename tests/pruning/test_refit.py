"""`refit=True`: the weights that stay go to their least-squares optimum, whoever chose them, and the report says so."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity import Output, Report, SparsityConfig, make_card, make_plan, open_streamed, prune, verify
from hf_sparsity.model.layers import find_layers
from hf_sparsity.pruners import ALPS
from tests.conftest import Stopped, auto, stop_after, tiny, tiny_batch
from tests.tools import row_and_column


def run(pruner, refit, architecture="llama", refine=None, pattern="unstructured", ignore=(), **options):
    model = tiny(architecture)
    batch = tiny_batch(architecture, sequences=6)
    batches = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(6)]
    plan = make_plan(
        model, SparsityConfig(0.5, pattern, pruner=pruner, refit=refit, refine=refine, ignore=ignore), batches
    )
    return model, prune(model, plan, batches, **options)


@pytest.mark.parametrize(
    ("architecture", "pruner"), row_and_column(["llama", "gpt2", "mixtral"], ["wanda", "magnitude", "sparsegpt"])
)
def test_it_lowers_the_error_and_moves_no_zero(pruner, architecture):
    _, plain = run(pruner, False, architecture)
    _, fitted = run(pruner, True, architecture)
    first = [name for name in plain.layers if ".0." in name and not fitted.layers[name].note]
    for name in first:
        before, after = plain.layers[name], fitted.layers[name]
        assert before.error_before_refit is None and after.zeros == before.zeros
        assert after.error <= after.error_before_refit * 1.05  # what is minimised has a ridge
    assert sum(fitted.layers[n].error for n in first) < 0.9 * sum(fitted.layers[n].error_before_refit for n in first)


def test_the_folder_says_it_and_verify_knows(tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    run("wanda", True, output_dir=tmp_path / "sparse")
    report = Report.load(tmp_path / "sparse/sparsity_report.json")
    assert all(layer.error_before_refit >= 0 for layer in report.layers.values())
    found = verify(tmp_path / "sparse", against=tmp_path / "dense")
    assert found.ok, found


@pytest.mark.parametrize(
    ("architecture", "pruner", "pattern"),
    [("llama", "wanda", "unstructured"), ("gpt2", "sparsegpt", "2:4"), ("mixtral", "magnitude", "2:4")],
)
def test_swaps_go_further_and_keep_the_number_of_zeros(architecture, pruner, pattern):
    ignore = ("*.[1-9].*", "*attn*")  # few layers are enough
    options = {"architecture": architecture, "pattern": pattern, "ignore": ignore}
    _, fitted = run(pruner, True, **options)
    model, swapped = run(pruner, None, refine="swaps", **options)
    first = [name for name in fitted.layers if ".0." in name and not fitted.layers[name].note]
    for name in first:
        before, after = fitted.layers[name], swapped.layers[name]
        assert after.error < before.error and after.swapped > 0 and before.swapped is None
        assert after.error_before_refit == pytest.approx(before.error_before_refit) and after.zeros == before.zeros
    noted = [layer for layer in swapped.layers.values() if layer.note]
    assert all(layer.swapped == 0 for layer in noted), "nothing is known of their inputs"
    for name, weight in find_layers(model).weights.items():
        if name in first and pattern == "2:4":
            assert ((weight.read() != 0).unflatten(1, (-1, 4)).sum(2) == 2).all(), name


def test_swapped_folders_are_the_same_streamed_and_verified(tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    few = ("*.self_attn.*", "model.layers.2")  # stay dense
    run("wanda", None, refine="swaps", ignore=few, output_dir=tmp_path / "memory")
    batches = [{"input_ids": row[None]} for row in tiny_batch("llama", sequences=6)["input_ids"]]
    streamed = open_streamed(tmp_path / "dense")
    plan = make_plan(streamed, SparsityConfig(0.5, refine="swaps", ignore=few), batches)
    with pytest.raises(Stopped):
        prune(streamed, plan, batches, output_dir=Output(tmp_path / "streamed", after_record=stop_after(1)))
    prune(open_streamed(tmp_path / "dense"), plan, batches, output_dir=tmp_path / "streamed")
    report = Report.load(tmp_path / "streamed/sparsity_report.json")
    assert all(layer.swapped > 0 for layer in report.layers.values())
    weights = [dict(auto("llama").from_pretrained(tmp_path / f).named_parameters()) for f in ("memory", "streamed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    found = verify(tmp_path / "streamed", against=tmp_path / "dense")
    assert found.ok, found.failed
    assert "--refine=swaps" in str(make_card(tmp_path / "streamed"))


class Spoiled(ALPS):
    """Sets all weights to zero."""

    def prune_sharing(self, layers):
        return [layer.weight * 0 for layer in layers]


def test_alps_is_never_worse_than_sparsegpt():
    _, report = run("alps", False)
    assert not any("sparsegpt" in layer.note for layer in report.layers.values())
    model, spoiled = run(Spoiled(), False)
    assert all("sparsegpt's result was taken" in layer.note for layer in spoiled.layers.values())
    assert all(layer.sparsity < 0.6 for layer in spoiled.layers.values())
    assert bool(torch.isfinite(next(model.parameters())).all())


def test_what_is_no_answer_is_refused():
    with pytest.raises(ValueError, match="refit='yes'"):
        SparsityConfig(0.5, refit="yes")
    with pytest.raises(ValueError, match="refine='swap'"):
        SparsityConfig(0.5, refine="swap")
    with pytest.raises(ValueError, match="ends with a refit"):
        SparsityConfig(0.5, refit=False, refine="swaps")
    config = SparsityConfig(0.5, refine="swaps")
    assert (
        config.refit
        and SparsityConfig.from_dict(config.to_dict()) == config
        and "refine" not in SparsityConfig(0.5).to_dict()
    )
    assert "refit" not in SparsityConfig(0.5).to_dict() and SparsityConfig(0.5, refit=True).to_dict()["refit"] is True
