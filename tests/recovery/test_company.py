"""SparsityCallback among other callbacks, trainers, optimizers and wrappers: what it promises holds beside all of them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    LlamaModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from hf_sparsity import SparsityCallback, measure_sparsity
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.sparsity import check_zeros
from hf_sparsity.recovery.running_norms import RunningNorms
from tests.conftest import tiny
from tests.recovery.trainers import DATA, IDS, PRUNE, sparse, trainer, zeros
from tests.tools import row_and_column


class Spoiler(TrainerCallback):
    """Changes all weights at one event, as callbacks that average or swap weights do."""

    def __init__(self, event):
        setattr(self, event, self.spoil)

    def spoil(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.data += 1e-3


class SeenInEvaluation(TrainerCallback):
    """Counts pruned weights that are not 0 at the end of each evaluation forward."""

    def __init__(self, model, dead):
        self.wrong = []
        values = dict(model.named_parameters())
        self.handle = model.register_forward_hook(
            lambda module, *_: (
                None
                if module.training
                else self.wrong.append(sum(int((values[n].detach()[gone] != 0).sum()) for n, gone in dead.items()))
            )
        )


@pytest.mark.parametrize(
    ("place", "event"),
    row_and_column(["after", "before"], ["on_step_end", "on_optimizer_step", "on_evaluate", "on_log", "on_step_begin"]),
)
def test_evaluations_and_checkpoints_have_the_zeros(event, place, tmp_path):
    model = sparse()
    dead = zeros(model)
    seen = SeenInEvaluation(model, dead)
    callbacks = [Spoiler(event), SparsityCallback()]
    often = {"eval_strategy": "steps", "eval_steps": 2}
    trainer(model, tmp_path, *callbacks[:: 1 if place == "before" else -1], **often).train()
    assert len(seen.wrong) == 2 and not any(seen.wrong)
    folders = list(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 2
    for folder in folders:
        found = zeros(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        assert all((found[n] | ~gone).all() for n, gone in dead.items())


def test_a_run_is_recorded_with_the_one_before(tmp_path):
    model = sparse()
    trainer(model, tmp_path / "a", SparsityCallback(), eval_strategy="steps", eval_on_start=True, eval_steps=2).train()
    first = model.config.sparsity_config["recovered"]
    assert first["method"] == "trainer" and first["steps"] == 4 and first["data"] is None and first["previous"] is None
    assert all(math.isfinite(first["evaluation"][when]) for when in ("before", "after"))
    saved = json.loads((tmp_path / "a/checkpoint-2/config.json").read_text())["sparsity_config"]["recovered"]
    assert saved["steps"] == 2 and saved["model"] == first["model"] and saved["versions"]["torch"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a/checkpoint-4", dtype=torch.float32)
    trainer(again, tmp_path / "b", SparsityCallback(), steps=2).train()
    second = again.config.sparsity_config["recovered"]
    assert second["steps"] == 2 and second["previous"]["steps"] == 4 and second["model"] != first["model"]


def test_a_resumed_run_is_one_run(tmp_path):
    trainer(sparse(), tmp_path, SparsityCallback(), steps=2).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    trainer(loaded, tmp_path, SparsityCallback()).train(resume_from_checkpoint=True)
    record = loaded.config.sparsity_config["recovered"]
    assert record["steps"] == 4 and record["previous"] is None
    start = json.loads((tmp_path / "checkpoint-2/config.json").read_text())["sparsity_config"]["recovered"]
    assert record["model"] == start["model"]


def test_early_stopping_while_sparsity_grows_gives_the_best_checkpoint_itself(tmp_path):
    model = tiny("llama")
    callback = SparsityCallback({"sparsity": 0.9, "pruner": "magnitude"}, schedule="linear", end=20, interval=1)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    run = trainer(model, tmp_path, callback, EarlyStoppingCallback(3), steps=24, learning_rate=1e-6, **best)
    run.train()
    assert run.state.global_step < 20, "it was not stopped early: nothing is tested"
    loaded = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint, dtype=torch.float32)
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    check_zeros(model)  # the config says what these weights have
    check_zeros(loaded)
    assert model.config.sparsity_config["config"] == loaded.config.sparsity_config["config"]
    assert callback.sparsity == pytest.approx(measure_sparsity(model).sparsity)
    record = model.config.sparsity_config["recovered"]
    assert record["method"] == "gradual" and record["options"]["end"] == 20
    assert record["steps"] == int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert model.config._name_or_path == ""


def test_every_checkpoint_says_what_it_has(tmp_path):
    callback = SparsityCallback(PRUNE, schedule="linear", end=4, interval=1)
    trainer(tiny("llama"), tmp_path, callback, steps=5, save_steps=1).train()
    targets = []
    for step in range(1, 6):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}", dtype=torch.float32)
        check_zeros(model)
        targets.append(model.config.sparsity_config["config"]["sparsity"])
    assert targets == sorted(targets) and targets[0] < 0.2 and targets[3:] == [0.6, 0.6]


class Fused(Trainer):
    """Puts a loss of its own into the model's forward, as TRL's trainers and Liger's kernels do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        def forward(labels, input_ids, fused):
            states = model.model(input_ids=input_ids).last_hidden_state
            return model.loss_function(model.lm_head(states), labels, vocab_size=model.config.vocab_size)

        model.forward = forward
        try:
            return model(labels=inputs["labels"], input_ids=inputs["input_ids"], fused=True)
        finally:
            del model.forward


class Parts(Trainer):
    """Calls the model's body and head itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        states = model.model(inputs["input_ids"]).last_hidden_state
        return model.loss_function(model.lm_head(states), inputs["labels"], vocab_size=model.config.vocab_size)


@pytest.mark.parametrize("kind", [Fused, Parts])
def test_gradual_pruning_by_inputs_in_trainers_with_their_own_forward(kind, tmp_path):
    ends = []
    for trains in (Trainer, kind):
        model = tiny("llama")
        callback = SparsityCallback({"sparsity": 0.6, "pruner": "wanda"}, schedule="cubic", end=3, interval=1)
        run = trainer(model, tmp_path / trains.__name__, callback)
        trains(model, run.args, train_dataset=DATA, callbacks=[callback]).train()
        ends.append(zeros(model))
        assert measure_sparsity(model).sparsity == pytest.approx(0.6, abs=1 / 64)
    assert all(torch.equal(ends[0][name], other) for name, other in ends[1].items())


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=128, d_model=32, max_position_embeddings=64, **sizes, **heads)
    )


@pytest.mark.parametrize("name", ["bart", "t5"])  # of T5 the body is the whole, which makes decoder inputs of labels
def test_gradual_pruning_of_encoder_decoders(name, tmp_path):
    model = bart() if name == "bart" else tiny(name)
    data = [{"input_ids": row[:8].tolist(), "labels": row[8:].tolist()} for row in IDS]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    callback = SparsityCallback({"sparsity": 0.5, "pruner": "wanda"}, schedule="cubic", end=3, interval=1)
    pad = SimpleNamespace(pad=lambda rows, **_: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]})
    pad.padding_side = "right"
    collate = DataCollatorForSeq2Seq(pad, padding=False)
    Seq2SeqTrainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[callback]).train()
    assert measure_sparsity(model).sparsity == pytest.approx(0.5, abs=1 / 16)
    norms = callback.gradual.norms
    assert set(norms.mean_sq) == set(find_layers(model).weights), "some inputs were not seen"


def test_norms_need_a_forward():
    model = tiny("llama")
    with pytest.raises(ValueError, match="pruner='magnitude'"):
        RunningNorms(list(find_layers(model).weights.values())).observe(model)


def test_a_model_without_its_head_is_trained_by_the_plan_of_the_whole(tmp_path):
    sparse().save_pretrained(tmp_path / "sparse")
    model = LlamaModel.from_pretrained(tmp_path / "sparse")
    dead = zeros(model)

    class Embedder(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"]).last_hidden_state.square().mean()

    run = trainer(model, tmp_path / "run", SparsityCallback())
    Embedder(model, run.args, train_dataset=DATA, callbacks=[SparsityCallback()]).train()
    assert all(torch.equal(found, dead[n]) for n, found in zeros(model).items())
    check_zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-4"))
