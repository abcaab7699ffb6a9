"""Teachers: in the loss of any Trainer by the callback, with chosen blocks, and from answers stored before."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sparsity import SparsityCallback, demo
from hf_sparsity.recovery.distillation import DistillationTrainer
from hf_sparsity.recovery.losses import square_head
from hf_sparsity.recovery.stored_logits import SHARD, StoredLogits, store_logits
from hf_sparsity.recovery.teacher import Teacher
from tests.conftest import tiny
from tests.recovery.trainers import IDS, sparse, zeros
from tests.tools import count_calls, fail_at

ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class Keep(TrainerCallback):
    """Remembers the gradients of the first optimizer step."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = self.seen or {n: p.grad.clone() for n, p in model.named_parameters()}


def run(folder, kind=Trainer, teacher=None, callback=None, rows=ROWS, steps=1, **given):
    """The model and the gradients of its first step, in two parts of four rows."""
    model, keep = sparse(), Keep()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=5, learning_rate=1e-3, logging_strategy="no",
    )  # fmt: skip
    more = {"teacher": teacher} if kind is DistillationTrainer else {}
    trainer = kind(model, arguments, train_dataset=rows, callbacks=[keep], **more, **given)
    (callback or SparsityCallback(teacher=teacher if kind is Trainer else None)).add_to(trainer)
    trainer.train()
    return model, keep.seen, trainer


def assert_same(ones, others, **tolerance):
    for name, value in ones.items():
        torch.testing.assert_close(value, others[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_callback_teaches_as_the_trainer_does(tmp_path):
    options = {"hard": 0.5, "hidden": 0.3, "temperature": 2.0, "top_k": 8, "blocks": [0, -1]}
    model, ours, trainer = run(tmp_path, teacher=Teacher(dense := tiny("llama"), **options))
    _, theirs, _ = run(tmp_path, DistillationTrainer, Teacher(dense, **options))
    _, without, _ = run(tmp_path)
    assert_same(ours, theirs)
    assert any(not torch.equal(value, without[name]) for name, value in ours.items())
    record = model.config.sparsity_config["recovered"]
    assert record["teacher"]["weights"] and record["options"]["top_k"] == 8 and record["options"]["blocks"] == [0, -1]
    plain = Trainer(model, trainer.args, eval_dataset=ROWS[:4]).evaluate()["eval_loss"]
    assert trainer.evaluate(ROWS[:4])["eval_loss"] == plain  # evaluation keeps the usual loss


def test_only_the_chosen_blocks_count():
    torch.manual_seed(0)
    student, dense, counted = sparse(), tiny("llama"), torch.ones(4, 16).bool()
    both = [m(IDS[:4], output_hidden_states=True) for m in (student, dense)]
    teacher = Teacher(dense, soft=0.0, hidden=1.0, blocks=[1])
    states = [[out.hidden_states[2]] for out in both]
    expected = square_head(*states, counted)
    torch.testing.assert_close(teacher.loss(both[0], {"input_ids": IDS[:4]}, counted), expected)
    with pytest.raises(ValueError, match="none is number 9"):
        Teacher(dense, hidden=1.0, blocks=[9]).loss(both[0], {"input_ids": IDS[:4]}, counted)


def test_stored_answers_teach_as_the_teacher_does(tmp_path):
    dense = tiny("llama")
    stored = store_logits(dense, IDS, tmp_path / "answers", top_k=8)
    _, live, _ = run(tmp_path, teacher=Teacher(dense, top_k=8))
    model, read, _ = run(tmp_path, teacher=Teacher(tmp_path / "answers"))
    assert_same(live, read, rtol=2e-3, atol=1e-5)  # of float16
    assert model.config.sparsity_config["recovered"]["teacher"]["weights"] == stored.record["teacher"]
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.int64), IDS[:4]], 1)
    found = stored({"input_ids": padded, "attention_mask": (torch.arange(19) >= 3).long().expand(4, -1)})
    torch.testing.assert_close(found.log_probabilities[:, 3:], stored({"input_ids": IDS[:4]}).log_probabilities)
    with pytest.raises(ValueError, match="has no answers"):
        stored({"input_ids": IDS[:1, :7]})


def test_storing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    from hf_sparsity.recovery import stored_logits as module

    dense = tiny("llama")
    monkeypatch.setattr(module, "SHARD", 4)
    assert SHARD > 4
    calls = count_calls(dense)
    fail_at(dense, 3, KeyboardInterrupt)  # it is asked once for each file
    with pytest.raises(KeyboardInterrupt):
        store_logits(dense, IDS[:12], tmp_path, top_k=4)
    assert len(StoredLogits(tmp_path)) == 8
    assert len(store_logits(dense, IDS[:12], tmp_path, top_k=4)) == 12 and len(calls) == 4
    store_logits(dense, IDS[:12], tmp_path, top_k=4)
    assert len(calls) == 4, "what is there is not computed again"
    with pytest.raises(ValueError, match="top_k differ"):
        store_logits(dense, IDS[:12], tmp_path, top_k=5)
    (tmp_path / "logits-00001.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"logits-00001\.safetensors is damaged"):
        StoredLogits(tmp_path)


def test_zeros_are_held_while_it_learns(tmp_path):
    dead = zeros(sparse())
    model, _, _ = run(tmp_path, teacher=Teacher(tiny("llama"), hard=0.0), steps=3)
    assert all(torch.equal(found, dead[name]) for name, found in zeros(model).items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Teacher(m, top_k=0), "top_k=0"),
        (lambda m: Teacher(m, blocks=[1]), "hidden= above 0"),
        (lambda m: Teacher(m, hidden=1.0, blocks=[]), "numbers of blocks"),
        (lambda m: Teacher(m, soft=-1.0), "soft=-1.0"),
        (lambda m: Teacher("no such folder"), "no stored logits"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny("llama"))


def test_a_teacher_has_to_be_put_into_the_trainer(tmp_path):
    callback = SparsityCallback(teacher=tiny("llama"))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(sparse(), arguments, train_dataset=ROWS, callbacks=[callback])
    with pytest.raises(ValueError, match=r"callback\.add_to\(trainer\)"):
        trainer.train()
    taught = DistillationTrainer(sparse(), arguments, train_dataset=ROWS, teacher=tiny("llama"))
    with pytest.raises(ValueError, match="a teacher already"):
        SparsityCallback(teacher=tiny("llama")).add_to(taught)
    with pytest.raises(ValueError, match=r"write Teacher\(model, soft="):
        DistillationTrainer(sparse(), arguments, teacher=Teacher(tiny("llama")), soft=2.0)


def test_a_trainer_whose_outputs_have_no_gradient_learns_all_the_same(tmp_path):
    """As TRL's, whose loss is fused with the head, so that it runs the model again for the outputs."""

    class Fused(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            if not return_outputs:
                return loss
            with torch.no_grad():
                return loss, model(**{k: v for k, v in inputs.items() if k != "labels"})

    options = {"hard": 0.5, "hidden": 0.3, "top_k": 8}
    dense = tiny("llama")
    _, fused, _ = run(tmp_path, Fused, callback=SparsityCallback(teacher=Teacher(dense, **options)))
    _, usual, _ = run(tmp_path, teacher=Teacher(dense, **options))
    assert_same(fused, usual, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_trls_trainer_learns_from_a_teacher(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    ids = IDS[:8]
    columns = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    rows = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, eos_token=tokenizer.eos_token, gradient_checkpointing=False, logging_strategy="no", remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    seen = {}
    for name, teacher in (("with", Teacher(tiny("llama"), hard=0.0)), ("without", None)):
        keep, model = Keep(), sparse()
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=[keep],
            data_collator=default_data_collator,
            processing_class=tokenizer,
        )
        SparsityCallback(teacher=teacher).add_to(trainer)
        trainer.train()
        seen[name] = keep.seen
    assert any(not torch.allclose(seen["with"][n], g) for n, g in seen["without"].items())
