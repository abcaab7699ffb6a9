"""hf-sparsity inspect: one model or two, in words, as JSON, as a picture."""

from __future__ import annotations

import json

import pytest

from hf_sparsity import Plan, SparsityConfig, make_plan, pack, prune, save_sparse
from hf_sparsity.cli.main import main
from tests.conftest import tiny


def run(capsys, *arguments, code=0):
    assert main(["inspect", *map(str, arguments)]) == code
    return capsys.readouterr()


def sparse(folder, name="llama", sparsity=0.5, allocator="uniform"):
    model = tiny(name)
    plan = make_plan(model, SparsityConfig(sparsity, allocator=allocator, pruner="magnitude"))
    save_sparse(model, folder, report=prune(model, plan))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two versions of one model, the second packed, and another model."""
    home = tmp_path_factory.mktemp("inspect")
    one, two = sparse(home / "one"), sparse(home / "two", sparsity=0.75)
    return one, pack(two, home / "packed"), sparse(home / "gpt2", "gpt2")


def test_two_models_and_their_difference(capsys, folders):
    shown = run(capsys, *folders[:2]).out
    table = shown.split("packed minus one, in percentage points")[1]
    assert table.count("+25.0") == 3 * 7 and "q_proj" in table
    result = json.loads(run(capsys, *folders[:2], "--json").out)
    assert [result[one]["reached"] for one in ("first", "second")] == pytest.approx([0.5, 0.75], abs=1e-3)


def test_a_folder_and_a_plan(capsys, folders, tmp_path):
    Plan.load(folders[0]).with_target(0.6).save(tmp_path / "plan.json")
    assert "+10.0" in run(capsys, folders[0], tmp_path / "plan.json").out
    assert json.loads(run(capsys, tmp_path / "plan.json", "--json").out)["reached"] is None


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_pictures(capsys, folders, tmp_path, suffix):
    file = tmp_path / f"out.{suffix}"
    assert run(capsys, folders[0], "--plot", file).out.endswith(f"picture written to {file}\n")
    one = file.read_bytes()
    assert one.startswith(b"\x89PNG" if suffix == "png" else b"<!DOCTYPE html>")
    assert "(replaced)" in run(capsys, folders[0], folders[1], "--plot", file).out and file.read_bytes() != one
    assert json.loads(run(capsys, folders[0], "--plot", file, "--json").out)["plot"] == str(file)
    assert file.read_bytes() == one and list(tmp_path.iterdir()) == [file]


def test_wrong_input_is_said_before_anything_is_read(capsys, folders, tmp_path):
    assert "must end in .png or .html" in run(capsys, folders[0], "--plot", tmp_path / "x.jpg", code=2).err
    assert "does not exist" in run(capsys, folders[0], "--plot", tmp_path / "nowhere" / "x.png", code=2).err
    assert "nowhere does not exist" in run(capsys, tmp_path / "nowhere", code=2).err
    assert "different models" in run(capsys, folders[0], folders[2], "--plot", tmp_path / "x.png", code=2).err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_other_layers_than_the_weights(capsys, folders, tmp_path):
    config = json.loads((folders[0] / "config.json").read_text())
    layers = config["sparsity_config"]["layers"]
    layers["model.layers.7.mlp.up_proj"] = layers["model.layers.0.mlp.up_proj"]
    for file in folders[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "model.layers.7.mlp.up_proj" in run(capsys, tmp_path, code=2).err
