"""Samples of the model itself: drawn from its own distribution, by the seed, and who cannot write them."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from hf_sparsity import calibration_batches
from hf_sparsity.calibration.self_sampling import self_samples
from hf_sparsity.checkpoint.streamed import open_streamed
from tests.conftest import tiny

END = 2


def memoryless(probabilities: dict[int, float]) -> hf.PreTrainedModel:
    """A Llama that knows nothing of what came before: the next token's probabilities are always these."""
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.fill_(-5.0)
        for token, probability in probabilities.items():
            model.lm_head.weight[token] = torch.tensor(probability).log() / 64  # width 64, every input is 1
    return model


def test_they_are_drawn_from_the_models_own_distribution():
    model = memoryless({5: 0.6, 6: 0.3, 7: 0.1})
    # Settings for chatting are no part of what the model believes.
    model.generation_config.update(temperature=0.2, top_k=1, repetition_penalty=5.0, do_sample=True)
    before = model.generation_config
    ids = self_samples(model, None, sequences=64, length=64)
    assert ids.shape == (64, 64) and ids.dtype == torch.int64
    written = ids[ids != END]
    found = torch.bincount(written, minlength=8)[5:8] / len(written)
    assert torch.allclose(found, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)
    assert model.generation_config is before


def test_texts_end_where_the_model_ends_them():
    ids = self_samples(memoryless({5: 0.8, END: 0.2}), None, sequences=32, length=32)
    assert float((ids == END).double().mean()) == pytest.approx(0.2, abs=0.05)
    assert set(ids.unique().tolist()) == {5, END}  # neither the token that begins texts nor padding


def test_the_same_seed_the_same_samples_and_nobody_elses_random_numbers_change():
    model = tiny("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    state = torch.get_rng_state()
    first = self_samples(model, None, sequences=3, length=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(3)
    assert torch.equal(self_samples(model, None, sequences=3, length=20, seed=1), first)
    assert not torch.equal(self_samples(model, None, sequences=3, length=20, seed=2), first)
    assert torch.equal(calibration_batches("self", model=model, sequences=3, length=20, seed=1), first)


def test_up_to_the_models_limit_and_beginning_after_another_text():
    model = tiny("gpt2")  # knows 128 positions
    model.generation_config.eos_token_id = model.config.eos_token_id = END
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    ids = self_samples(model, None, sequences=2, length=128)
    assert ids.shape == (2, 128) and int(ids.max()) < 128


def test_texts_that_end_at_once_are_left_out():
    ids = self_samples(memoryless({5: 0.2, END: 0.8}), None, sequences=8, length=32)
    after_an_end = ids.flatten()[1:][ids.flatten()[:-1] == END]
    assert bool((after_an_end == 5).all())


def test_who_writes_nothing(tmp_path):
    headless = hf.AutoModel.from_config(tiny("llama").config)
    nameless = tiny("gpt2")
    nameless.generation_config = hf.GenerationConfig()
    nameless.config.bos_token_id = nameless.config.eos_token_id = None
    tiny("llama").save_pretrained(tmp_path)
    for model, message in (
        (None, "pass model="),
        (tiny("t5"), "encoder-decoder"),
        (headless, "LlamaModel cannot generate text"),
        (nameless, "no token that begins or ends a text"),
        (memoryless({END: 1.0}), "ended 256 texts before they began"),
        (open_streamed(tmp_path), "streamed from disk"),
    ):
        with pytest.raises(ValueError, match=message):
            self_samples(model, None, sequences=2, length=8)
