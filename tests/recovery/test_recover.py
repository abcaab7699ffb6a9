"""recover: better than before, every zero kept, resumable to the bit, a folder that is whole or visibly not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparsity import SparseModel, calibration_batches, demo, make_plan, prune
from hf_sparsity.cli import recover as command
from hf_sparsity.files import MARKER, check_finished
from hf_sparsity.model.layers import find_layers
from hf_sparsity.pruning.reconstruction import BlockReconstruction
from hf_sparsity.recovery.recover import recover
from tests.conftest import tiny
from tests.recovery.trainers import Cut, call_at, cut_after
from tests.tools import row_and_column

# A language with something to learn: each token follows from the one before.
START = torch.randint(3, 120, (48, 1), generator=torch.Generator().manual_seed(3))
IDS = (START + torch.arange(16) * 7) % 117 + 3
QUICK = {"steps": 10, "batch": 4, "lr": 3e-3}


def sparse(name="llama", dtype=torch.float32):
    model = tiny(name, dtype)
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    return model


def planned(model):
    names = {weight.parameter for weight in find_layers(model).weights.values()}
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in names}


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def cut_before(patch, file):
    """Lets the power fail just before `file` is put in its place; returns what was put in its place by then."""
    moved, replace = [], os.replace

    def fail(source, target):
        if Path(target) == file:
            raise Cut
        moved.append(str(target))
        replace(source, target)

    patch.setattr(os, "replace", fail)
    return moved


@pytest.mark.parametrize(("method", "dtype"), row_and_column(["lora", "full"], [torch.float32, torch.bfloat16]))
def test_zeros_stay_and_survivors_move(tmp_path, method, dtype):
    model = sparse(dtype=dtype)
    before = planned(model)
    result = recover(model, IDS, method, output_dir=tmp_path / "out", **QUICK)
    after = planned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for name, old in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], planned(result)[name])
        assert not after[name][old == 0].any()
        assert (after[name] != old)[old != 0].float().mean() > 0.5
    assert not result.training and all(p.requires_grad for p in result.parameters())
    assert not hasattr(result, "peft_config")


def test_the_config_says_what_was_done(tmp_path):
    recover(sparse(), IDS, "full", output_dir=tmp_path / "out", teacher=tiny("llama"), hidden=0.5, **QUICK)
    stored = json.loads((tmp_path / "out/config.json").read_text())["sparsity_config"]
    done = stored["recovered"]
    assert done["method"] == "full" and done["steps"] == 10 and done["tokens"] == 10 * 4 * 16
    assert done["options"]["lr"] == 3e-3 and done["options"]["hidden"] == 0.5 and done["options"]["seed"] == 0
    assert done["data"]["sequences"] == 48 and done["data"]["heldout"] == 3 and len(done["data"]["sha256"]) == 64
    assert done["loss"]["after"] < done["loss"]["before"]
    assert done["versions"]["torch"] and done["teacher"]["weights"] and stored["layers"] and stored["pruned"]
    check_finished(tmp_path / "out")
    SparseModel.from_pretrained(tmp_path / "out")
    again = recover(tmp_path / "out", IDS, output_dir=tmp_path / "more", **QUICK)
    assert again.config.sparsity_config["recovered"]["previous"]["method"] == "full"


def test_losses_are_of_sequences_that_are_never_trained_on(tmp_path):
    ids = torch.randint(3, 120, (48, 16))
    model, seen = sparse(), []  # rows that the model gets while it is in training
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.extend(args[0]) if module.training else None
    )
    with torch.no_grad():
        expected = float(model(input_ids=ids[-3:], labels=ids[-3:]).loss)
    result = recover(model, ids, output_dir=tmp_path / "out", **QUICK)
    loss = result.config.sparsity_config["recovered"]["loss"]
    assert loss["before"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert loss["after"] == pytest.approx(float(result(input_ids=ids[-3:], labels=ids[-3:]).loss), rel=1e-5)
    assert len(seen) == 40 and {tuple(row.tolist()) for row in seen} <= {tuple(row.tolist()) for row in ids[:-3]}
    assert len({tuple(row.tolist()) for row in seen}) == 40, "a row comes twice before each came once"


@pytest.mark.parametrize(
    ("method", "step", "event"), [("lora", 5, "on_save"), ("full", 7, "on_step_end"), ("lora", 10, "on_train_end")]
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, method, step, event):
    given = {**QUICK, "teacher": tiny("llama"), "accumulation": 2}
    whole = state(recover(sparse(), IDS, method, output_dir=tmp_path / "whole", **given))
    with monkeypatch.context() as patch:
        cut_after(patch, step, event)
        with pytest.raises(Cut):
            recover(sparse(), IDS, method, output_dir=tmp_path / "cut", **given)
    assert (tmp_path / "cut" / MARKER).is_dir() and not (tmp_path / "cut/config.json").exists()
    with pytest.raises(ValueError, match="unfinished"):
        check_finished(tmp_path / "cut")
    if event == "on_save":  # killed before the checkpoint was recorded, so it may be cut short
        for file in (tmp_path / "cut" / MARKER / "trainer/checkpoint-5").iterdir():
            file.write_bytes(b"")
    torch.manual_seed(123)
    steps = []
    with monkeypatch.context() as patch:
        call_at(patch, "on_step_end", steps.append)
        result = state(recover(sparse(), IDS, method, output_dir=tmp_path / "cut", **given))
    assert len(steps) < 10, "it began anew"
    assert all(torch.equal(value, whole[name]) for name, value in result.items())
    assert {f.name for f in (tmp_path / "cut").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
    mine, other = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("cut", "whole"))
    assert mine == other


def test_the_seed_decides_alone(tmp_path):
    results = []
    for number, seed in enumerate((0, 0, 1)):
        model = sparse()
        torch.manual_seed(100 + number)
        given = {**QUICK, "steps": 2, "seed": seed}
        results.append(state(recover(model, IDS, output_dir=tmp_path / str(number), **given)))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert any(not torch.equal(value, results[2][name]) for name, value in results[0].items())


@pytest.mark.parametrize("name, method", [("mixtral", "full"), ("gpt2", "lora")])
def test_experts_and_conv1d_interrupted_and_resumed(tmp_path, monkeypatch, name, method):
    """The Trainer itself does not load a checkpoint's experts."""
    given = {**QUICK, "steps": 4}
    before = planned(sparse(name))
    whole = recover(sparse(name), IDS, method, output_dir=tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            recover(sparse(name), IDS, method, output_dir=tmp_path / "cut", **given)
    result = state(recover(sparse(name), IDS, method, output_dir=tmp_path / "cut", **given))
    assert all(torch.equal(value, result[n]) for n, value in state(whole).items())
    assert all(not result[n][old == 0].any() for n, old in before.items())


def test_other_arguments_are_refused_and_overwrite_starts_anew(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            recover(sparse(), IDS, output_dir=out, **QUICK)
    other = sparse()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[other.model.layers[0].mlp.up_proj.weight != 0] *= 1.5
    for model, data, change, named in (
        (sparse(), IDS, {"lr": 1e-3}, "lr"),
        (sparse(), IDS, {"steps": 11}, "steps"),
        (sparse(), IDS, {"seed": 1}, "seed"),
        (sparse(), IDS, {"method": "full"}, "method"),
        (sparse(), IDS, {"teacher": tiny("llama")}, "teacher"),
        (sparse(), IDS.flip(0), {}, "data"),
        (other, IDS, {}, "model"),
    ):
        with pytest.raises(ValueError, match=rf"other arguments.*{named}"):
            recover(model, data, output_dir=out, **QUICK | change)
    taught = tmp_path / "taught"
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            recover(sparse(), IDS, output_dir=taught, teacher=tiny("llama"), **QUICK)
    with pytest.raises(ValueError, match="other arguments: teacher"):
        recover(sparse(), IDS, output_dir=taught, teacher=other, **QUICK)
    recover(sparse(), IDS, output_dir=out, overwrite=True, **QUICK | {"steps": 3})
    assert not (out / MARKER).exists()
    with pytest.raises(ValueError, match="complete already, of a run with another steps and tokens"):
        recover(sparse(), IDS, output_dir=out, **QUICK)


def test_a_crash_while_the_folder_is_completed(tmp_path, monkeypatch):
    """Files are moved out one by one; `config.json` is the last, and until then the folder is marked."""
    whole = state(recover(sparse(), IDS, "full", output_dir=tmp_path / "whole", **QUICK))
    with monkeypatch.context() as patch:
        moved = cut_before(patch, tmp_path / "out/config.json")
        with pytest.raises(Cut):
            recover(sparse(), IDS, "full", output_dir=tmp_path / "out", **QUICK)
    assert any("safetensors" in name for name in moved)
    assert not (tmp_path / "out/config.json").exists() and (tmp_path / "out" / MARKER).exists()
    result = state(recover(sparse(), IDS, "full", output_dir=tmp_path / "out", **QUICK))
    assert all(torch.equal(value, whole[name]) for name, value in result.items())
    assert not list((tmp_path / "out").glob(".*")) and not (tmp_path / "out" / MARKER).exists()


class MergesWhenEvaluated(torch.nn.Linear):
    """Adds to its weight when training ends, as some adapters do."""

    def train(self, mode=True):
        if self.training and not mode:
            with torch.no_grad():
                weight = self.weight.view(-1)
                weight[(weight == 0).nonzero()[0]] = 1e-9
        return super().train(mode)


def test_a_lost_zero_is_an_error_and_nothing_is_published(tmp_path):
    model = sparse()
    model.model.layers[1].mlp.up_proj.__class__ = MergesWhenEvaluated
    with pytest.raises(RuntimeError, match=r"lost zeros in 1 parameters, 1 in model\.layers\.1\.mlp\.up_proj"):
        recover(model, IDS, "full", output_dir=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out/config.json").exists()


def test_a_run_that_changes_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no weight changed"):
        recover(sparse(dtype=torch.bfloat16), IDS, "lora", output_dir=tmp_path / "out", **QUICK | {"lr": 1e-12})
    assert not (tmp_path / "out/config.json").exists()


def test_the_teacher_helps_and_stays(tmp_path):
    teacher = tiny("llama")
    before = state(teacher)
    ids = torch.randint(3, 120, (48, 16))
    model = recover(sparse(), ids, "full", output_dir=tmp_path / "out", teacher=teacher, hard=0.0, **QUICK)
    with torch.no_grad():
        dense = teacher(input_ids=ids).logits
        distances = [float((dense - one(input_ids=ids).logits).square().mean()) for one in (sparse(), model)]
    assert distances[1] < 0.7 * distances[0]
    assert all(torch.equal(value, before[name]) for name, value in state(teacher).items())


def test_texts_and_folders_with_a_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    model = AutoModelForCausalLM.from_pretrained(demo.PATH, dtype=torch.bfloat16)  # which the result keeps
    texts = [text for _, text in demo.texts("calibration")][:12]
    batches = calibration_batches(texts, tokenizer, sequences=4, length=64)
    prune(model, make_plan(model, {"sparsity": 0.7, "pruner": "wanda"}, batches), batches)
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    dead = {n: p == 0 for n, p in planned(model).items()}
    result = recover(
        tmp_path / "sparse", texts, output_dir=tmp_path / "out", teacher=demo.PATH, tokens=2000, length=64, batch=4
    )
    done = result.config.sparsity_config["recovered"]
    assert done["steps"] == 8 and done["loss"]["after"] < done["loss"]["before"] - 0.05
    assert done["options"]["lr"] == pytest.approx(6e-3) and done["options"]["rank"] == 16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert all(not p[dead[n]].any() for n, p in planned(loaded).items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == tokenizer.vocab_size


def test_the_command(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    model = AutoModelForCausalLM.from_pretrained(demo.PATH)
    prune(model, make_plan(model, {"sparsity": 0.7, "pruner": "magnitude"}))
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.add_arguments(parser)
    given = [str(tmp_path / "sparse"), "--output", str(tmp_path / "out"), "--steps", "3", "--batch", "2"]
    with pytest.raises(ValueError, match="--data is missing"):
        command.run(parser.parse_args(given))
    result = command.run(parser.parse_args([*given, "--teacher", "demo", "--method", "full"]))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "full: 3 steps, 768 tokens; every zero kept" and said[2] == f"saved to {tmp_path / 'out'}"
    assert result["perplexity"]["after"] < result["perplexity"]["before"] and result["method"] == "full"
    assert json.loads(json.dumps(result)) == result
    (tmp_path / "text.txt").write_text(demo.texts("calibration")[0][1])
    given[2] = str(tmp_path / "other")
    command.run(parser.parse_args([*given, "--data", str(tmp_path / "text.txt"), "--length", "32", "--json"]))
    assert capsys.readouterr().out == ""


def test_reconstruction_of_the_teacher_by_the_plan(tmp_path, monkeypatch):
    teacher, model = tiny("llama"), tiny("llama")
    batches = IDS[:8]
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "wanda"}, batches), batches)
    given = {"teacher": teacher, "reconstruct": BlockReconstruction(epochs=2)}
    before = state(teacher)
    whole = recover(model, IDS, "reconstruct", output_dir=tmp_path / "whole", **given)
    assert all(torch.equal(value, before[name]) for name, value in state(teacher).items())
    assert {n: int((p == 0).sum()) for n, p in planned(whole).items()} == {
        n: int((p == 0).sum()) for n, p in planned(model).items()
    }
    stored = json.loads((tmp_path / "whole/config.json").read_text())["sparsity_config"]
    assert stored["recovered"]["options"]["reconstruct"]["epochs"] == 2 and stored["recovered"]["tokens"] == 45 * 16
    assert stored["pruned"]["reconstruction"]
    with torch.no_grad():
        dense = teacher(input_ids=IDS).logits
        distances = [float((dense - one(input_ids=IDS).logits).square().mean()) for one in (model, whole)]
    assert distances[1] < distances[0]
    with monkeypatch.context() as patch:
        cut_before(patch, tmp_path / "cut/config.json")
        with pytest.raises(Cut):
            recover(model, IDS, "reconstruct", output_dir=tmp_path / "cut", **given)
    with pytest.raises(ValueError, match=r"other arguments.*options"):
        recover(model, IDS, "reconstruct", output_dir=tmp_path / "cut", teacher=teacher)
    again = recover(model, IDS, "reconstruct", output_dir=tmp_path / "cut", **given)
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(again).items())
    assert not (tmp_path / "cut" / MARKER).exists()


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    for change, message in (
        ({"method": "magic"}, "one of lora, full, reconstruct"),
        ({"method": "reconstruct"}, "pass teacher="),
        ({"tokens": 100}, "steps or tokens"),
        ({"steps": 0}, "steps=0"),
        ({"batch": True}, "batch=True"),
        ({"accumulation": 3}, "cannot be cut"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"teacher": tiny("llama"), "soft": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            recover(sparse(), IDS, output_dir=out, **QUICK | change)
    model = sparse()
    with pytest.raises(ValueError, match="share weights"):
        recover(model, IDS, output_dir=out, teacher=model, **QUICK)
    with pytest.raises(ValueError, match="no sparsity plan"):
        recover(tiny("llama"), IDS, output_dir=out, **QUICK)
    with pytest.raises(ValueError, match="fill 1 sequences"):
        recover(sparse(), IDS[:1], output_dir=out, **QUICK)
    with pytest.raises(ValueError, match="vocabulary"):
        recover(sparse(), IDS + 100, output_dir=out, **QUICK)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        recover(sparse(), IDS, output_dir=out, **QUICK)
    shutil.rmtree(out)
