"""`refit=True`: the weights that stay go to their least-squares optimum, whoever chose them, and the report says so."""

from __future__ import annotations

import pytest
import torch

from hf_sparsity import Report, SparsityConfig, make_plan, prune, verify
from hf_sparsity.pruners import ALPS
from tests.conftest import tiny, tiny_batch
from tests.tools import row_and_column


def run(pruner, refit, architecture="llama", **options):
    model = tiny(architecture)
    batch = tiny_batch(architecture, sequences=6)
    batches = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(6)]
    plan = make_plan(model, SparsityConfig(0.5, pruner=pruner, refit=refit), batches)
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
    assert "refit" not in SparsityConfig(0.5).to_dict() and SparsityConfig(0.5, refit=True).to_dict()["refit"] is True
