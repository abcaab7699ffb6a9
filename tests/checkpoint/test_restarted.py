"""The same call on an output that is complete already says so and gives the model; other arguments are named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf

from hf_sparsity import (
    Output,
    Plan,
    Report,
    SparseModel,
    SparsityConfig,
    make_plan,
    open_streamed,
    pack,
    prune,
    recover,
    save_sparse,
)
from hf_sparsity.cli.main import main
from tests.conftest import tiny

CONFIG = SparsityConfig(0.5, allocator="owl", pruner="wanda")
ROWS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def run(source, output, *, rows=ROWS, config=CONFIG, stream=False):
    model = open_streamed(source) if stream else hf.AutoModelForCausalLM.from_pretrained(source)
    plan = make_plan(model, config, rows, output_dir=output)
    return model, plan, prune(model, plan, rows, output_dir=output)


def files(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_same_run_again(source, layout, stream, tmp_path):
    out = tmp_path / "out"
    first, plan, report = run(source, Output(out, layout=layout))
    before = files(out)
    computed = []
    if not stream:
        hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: computed.append(1))
    again = run(source, Output(out, layout=layout), stream=stream)
    if not stream:
        hook.remove()
    assert files(out) == before and not computed
    assert again[1] == plan and again[2] == Report.load(out / "sparsity_report.json")
    assert again[2].sparsity == report.sparsity
    assert again[0].config.sparsity_config == first.config.sparsity_config
    if not stream:
        state = first.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again[0].state_dict().items())
    elif layout == "dense":
        with torch.no_grad():
            assert torch.equal(again[0](ROWS).logits, first(ROWS).logits)


def test_other_arguments_are_named_and_nothing_is_touched(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = files(out)
    with pytest.raises(ValueError, match="complete already, of a run with another data"):
        run(source, out, rows=ROWS[:2])
    with pytest.raises(ValueError, match="another config"):
        run(source, out, config=SparsityConfig(0.6, allocator="owl", pruner="wanda"))
    with pytest.raises(ValueError, match="another layout"):
        run(source, Output(out, layout="bitmask"))
    model = hf.AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match=r"another .*plan"):
        prune(model, make_plan(model, SparsityConfig(0.7)), ROWS, output_dir=out)
    assert files(out) == before
    run(source, Output(out, overwrite=True), rows=ROWS[:2])
    assert Plan.load(out).data["sequences"] == 2


def test_a_folder_without_a_record_is_refused_as_before(source, tmp_path):
    out = tmp_path / "out"
    model, _, report = run(source, None)
    save_sparse(model, out, report=report)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        run(source, out)
    shutil.rmtree(out)
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"sparsity_config": {"pruned": {"arguments": 3}}}))
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        run(source, out)


def test_from_pretrained_and_the_command(source, tmp_path, capsys):
    def load():
        return SparseModel.from_pretrained(
            source, sparsity_config=CONFIG, calibration_data=ROWS, output_dir=tmp_path / "out"
        )

    first, again = load(), load()
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in again.state_dict().items())
    command = ["prune", str(source), "--sparsity", "0.5", "--pruner", "magnitude", "--output", str(tmp_path / "cli")]
    assert main(command) == 0
    assert "complete already" not in capsys.readouterr().out
    assert main(command) == 0
    assert "complete already" in capsys.readouterr().out
    command[3] = "0.6"
    assert main(command) == 2
    assert "another config" in capsys.readouterr().err


def test_packing_a_folder_leaves_the_record_true(source, tmp_path):
    run(source, tmp_path / "out")
    pack(tmp_path / "out", tmp_path / "packed")
    run(source, Output(tmp_path / "packed", layout="bitmask"))


def test_recovering_again(source, tmp_path):
    run(source, tmp_path / "out")
    rows = ROWS.repeat(8, 1)

    def again(**options):
        given = {"steps": 2, "batch": 2, "length": 16} | options
        return recover(tmp_path / "out", rows, method="full", output_dir=tmp_path / "recovered", **given)

    first = again()
    before = files(tmp_path / "recovered")
    second = again()
    assert files(tmp_path / "recovered") == before
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in second.state_dict().items())
    with pytest.raises(ValueError, match="complete already, of a run with another"):
        again(steps=3)


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_saving_again(name, layout, tmp_path):
    """A job that prunes in memory and saves may be started again; another model is refused with what differs."""

    def job(sparsity=0.6, scale=1.0):
        model = tiny(name)
        report = prune(model, make_plan(model, SparsityConfig(sparsity, pruner="magnitude")))
        with torch.no_grad():
            model.lm_head.weight *= scale
        return save_sparse(model, tmp_path / "out", report=report, layout=layout)

    job()
    before = files(tmp_path / "out")
    assert job() == tmp_path / "out" and files(tmp_path / "out") == before
    with pytest.raises(ValueError, match="holds another sparse model: another plan or record"):
        job(0.5)
    with pytest.raises(ValueError, match=r"holds another sparse model: other values of lm_head.weight"):
        job(scale=2.0)
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        job()
