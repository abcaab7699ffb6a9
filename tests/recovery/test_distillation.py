"""Distillation: the losses against their formulas, and the Trainer that mixes them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sparsity import make_plan, prune
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.recovery.callback import SparsityCallback
from hf_sparsity.recovery.distillation import DistillationTrainer
from hf_sparsity.recovery.losses import kl_loss, square_head
from tests.conftest import tiny

IDS = torch.randint(3, 120, (8, 16), generator=torch.Generator().manual_seed(3))


def labelled(ids=IDS):
    """Rows whose labels end, or begin, at another place in each."""
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: i % 3 * 2] = -100
        row[16 - i :] = -100
    return [{"input_ids": row, "labels": wanted} for row, wanted in zip(ids, labels, strict=True)]


def student(seed=5):
    model = tiny("llama")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    return model


def trainer(model, folder, teacher, data=None, **given):
    names = {"hard", "soft", "hidden", "temperature"}
    options = {name: given.pop(name) for name in names & set(given)}
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | given,
    )
    return DistillationTrainer(model, arguments, train_dataset=data or labelled(), teacher=teacher, **options)


def gradients(model, folder, teacher, size=8, **options):
    """Of one optimizer step over all rows, in batches of `size`."""
    seen = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **k):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

    built = trainer(
        model,
        folder,
        teacher,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        max_grad_norm=0.0,
        **options,
    )
    built.add_callback(Keep())
    built.train()
    return seen


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 300, 10**6])
def test_kl_is_the_formula_whatever_the_chunk(temperature, chunk):
    ours, theirs = torch.randn(3, 5, 40, requires_grad=True), torch.randn(3, 5, 40)
    counted = torch.rand(3, 5) > 0.4
    loss = kl_loss(ours, theirs, counted, temperature=temperature, chunk=chunk)
    (grad,) = torch.autograd.grad(loss * 3, ours)
    again = ours.detach().clone().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            if counted[i, j]:
                p, q = (theirs[i, j].double() / temperature).exp(), (again[i, j] / temperature).exp()
                p, q = p / p.sum(), q / q.sum()
                expected = expected + temperature**2 * (p * (p / q).log()).sum()
    (wanted,) = torch.autograd.grad(expected * 3, again)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-6)
    assert not grad[~counted].any()


def test_kl_of_bf16_logits_is_computed_in_float32():
    ours, theirs = torch.randn(4, 50).bfloat16().requires_grad_(), torch.randn(4, 50).bfloat16()
    loss = kl_loss(ours, theirs)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, ours)[0].dtype == torch.bfloat16
    torch.testing.assert_close(loss, kl_loss(ours.float(), theirs.float()))


def test_square_head_is_the_formula():
    ours = [torch.randn(2, 6, 8, requires_grad=True) for _ in range(3)]
    theirs = [torch.randn(2, 6, 8) * (i + 1) for i in range(3)]
    counted = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    expected = 0.0
    for s, t in zip(ours, theirs, strict=True):
        for i, n in ((0, 3), (1, 5)):
            a, b = s[i][counted[i]], t[i][counted[i]]
            expected += n * float(((a.detach() - b) ** 2).mean() / (b**2).mean()) / 3
    assert float(square_head(ours, theirs, counted)) == pytest.approx(expected, rel=1e-5)
    # With one sequence, divided by its positions, it is the paper's formula.
    one = float(square_head([ours[0][:1]], [theirs[0][:1]], torch.ones(1, 6).bool())) / 6
    paper = torch.nn.functional.mse_loss(ours[0][:1], theirs[0][:1]) / theirs[0][:1].square().mean()
    assert one == pytest.approx(float(paper), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"hard": 0.4, "hidden": 0.7, "temperature": 2.0}, {"hard": 0.0, "soft": 0.3}])
def test_the_loss_is_the_weighted_sum_per_prediction(tmp_path, options):
    model, teacher = student(), tiny("llama")
    got = gradients(model, tmp_path, teacher, learning_rate=0.0, **options)
    batch = {k: torch.stack([row[k] for row in labelled()]) for k in ("input_ids", "labels")}
    weights = {"hard": 1.0, "soft": 1.0, "hidden": 0.0, "temperature": 1.0} | options
    counted = torch.zeros_like(batch["labels"]).bool()
    counted[:, :-1] = batch["labels"][:, 1:] != -100
    model.zero_grad()
    out = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        dense = teacher(input_ids=batch["input_ids"], output_hidden_states=True)
    t = weights["temperature"]
    ours, theirs = ((x.logits[counted] / t).log_softmax(-1) for x in (out, dense))
    loss = weights["hard"] * out.loss + weights["soft"] * t**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
    for s, d in zip(out.hidden_states[1:], dense.hidden_states[1:], strict=True):
        for i, keep in enumerate(counted):
            if keep.any():
                error = ((s[i][keep] - d[i][keep]) ** 2).mean() / (d[i][keep] ** 2).mean()
                loss = loss + weights["hidden"] * error * keep.sum() / counted.sum() / 3
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{"hidden": 0.5, "temperature": 2.0}, {"hard": 0.0, "hidden": 0.5}])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, options):
    teacher = tiny("llama")
    whole = gradients(student(), tmp_path, teacher, size=8, learning_rate=0.0, **options)
    parts = gradients(student(), tmp_path, teacher, size=2, learning_rate=0.0, **options)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_teacher_stays_what_it_is(tmp_path):
    model, teacher = student(), tiny("llama").train()
    before = copy.deepcopy(teacher.state_dict())
    built = trainer(model, tmp_path, teacher, max_steps=3, learning_rate=1e-2, save_strategy="steps", save_steps=3)
    built.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-3" / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(model.state_dict())


def test_training_moves_towards_the_teacher_with_every_zero(tmp_path):
    teacher, model = tiny("llama"), tiny("llama")
    prune(model, make_plan(model, {"sparsity": 0.6, "pruner": "magnitude"}))
    dead = {n: p == 0 for n, p in model.named_parameters()}
    with torch.no_grad():
        far = kl_loss(model(IDS).logits, teacher(IDS).logits)
    built = trainer(model, tmp_path, teacher, max_steps=30, learning_rate=3e-3, hard=0.0)
    built.add_callback(SparsityCallback())
    built.train()
    with torch.no_grad():
        near = kl_loss(model.eval()(IDS).logits, teacher(IDS).logits)
    assert near < far / 2
    assert all(not p[dead[n]].any() for n, p in model.named_parameters())


def test_a_streamed_teacher_teaches_the_same(tmp_path):
    teacher = tiny("llama")
    teacher.save_pretrained(tmp_path / "dense")
    streamed = open_streamed(tmp_path / "dense")
    whole = gradients(student(), tmp_path, teacher, learning_rate=0.0, hidden=0.5)
    again = gradients(student(), tmp_path, streamed, learning_rate=0.0, hidden=0.5)
    assert all(torch.equal(again[name], gradient) for name, gradient in whole.items())


def test_evaluation_reports_the_usual_loss(tmp_path):
    model = student()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    plain = Trainer(model, arguments, eval_dataset=labelled()).evaluate()["eval_loss"]
    ours = DistillationTrainer(model, arguments, eval_dataset=labelled(), teacher=tiny("llama"))
    assert ours.evaluate()["eval_loss"] == plain


def test_what_makes_no_sense_is_refused(tmp_path):
    model = student()
    with pytest.raises(ValueError, match="share weights"):
        trainer(model, tmp_path, model)
    with pytest.raises(ValueError, match="vocabulary of 128 and the teacher of 64"):
        small = tiny("llama")
        small.resize_token_embeddings(64)
        trainer(model, tmp_path, small)
    for bad in ({"soft": -1.0}, {"soft": 0.0}, {"temperature": 0.0}, {"hard": math.nan, "soft": -math.inf}):
        with pytest.raises(ValueError, match="expected"):
            trainer(model, tmp_path, tiny("llama"), **bad)
    with pytest.raises(ValueError, match="needs labels"):
        trainer(model, tmp_path, tiny("llama"), data=[{"input_ids": row} for row in IDS]).train()
    with pytest.raises(ValueError, match="do not compare"):
        kl_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="do not compare"):
        square_head([torch.zeros(1, 2, 3)], [], torch.ones(1, 2).bool())
