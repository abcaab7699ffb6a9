"""The class of a model is read from its config, or named by the caller; what a class cannot do is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from hf_sparsity import (
    Plan,
    SparseModel,
    SparsityConfig,
    certify,
    demo,
    evaluate,
    evaluate_text,
    make_plan,
    measure_sparsity,
    prune,
    recover,
    save_sparse,
    verify,
)
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.cli.main import main
from hf_sparsity.evaluation.texts import Text
from hf_sparsity.model.classes import is_model_class, model_class, predicts_next_token, text_config
from hf_sparsity.model.layers import find_layers
from hf_sparsity.model.loading import load_model
from tests.conftest import tiny
from tests.model.shrink import small_model

MAGNITUDE = SparsityConfig(0.5, pruner="magnitude")
IDS = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(0))


def config(kind, *architectures, **changes):
    made = kind(**changes)
    made.architectures = list(architectures) or None
    return made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (config(hf.LlamaConfig, "LlamaForSequenceClassification"), hf.LlamaForSequenceClassification),
        (config(hf.LlamaConfig, "LlamaModel"), hf.LlamaModel),
        (config(hf.BertConfig, "BertForPreTraining"), hf.BertForPreTraining),
        (config(hf.BartConfig, "BartForConditionalGeneration"), hf.BartForConditionalGeneration),
        (config(hf.WhisperConfig, "WhisperForConditionalGeneration"), hf.WhisperForConditionalGeneration),
        (config(hf.LlavaConfig, "LlavaForConditionalGeneration"), hf.LlavaForConditionalGeneration),
        (config(hf.LlamaConfig, "AClassOfTheFuture", "LlamaForCausalLM"), hf.LlamaForCausalLM),
        # A class that transformers does not have, or one for another config: the Auto class of the head that its name says.
        (config(hf.LlamaConfig, "LLaMAForCausalLM"), hf.AutoModelForCausalLM),
        (config(hf.MistralConfig, "LlamaForCausalLM"), hf.AutoModelForCausalLM),
        (config(hf.MistralConfig, "LlamaForSequenceClassification"), hf.AutoModelForSequenceClassification),
        (config(hf.LlavaConfig, "MyLlavaForConditionalGeneration"), hf.AutoModelForImageTextToText),
        # None named.
        (config(hf.LlamaConfig), hf.AutoModelForCausalLM),
        (config(hf.T5Config), hf.AutoModelForSeq2SeqLM),
        # Code that comes with the checkpoint is left to the Auto class, which asks for trust_remote_code.
        (
            config(hf.LlamaConfig, "Mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
            hf.AutoModelForCausalLM,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value.architectures),
)
def test_the_class_is_the_one_that_the_config_names(given, expected):
    assert model_class(given) is expected


@pytest.mark.parametrize("name", ["Trainer", "AutoTokenizer", "LlamaConfig", "os.system", "__import__", "", "pipeline"])
def test_what_is_no_model_class_is_not_looked_at(name):
    assert not is_model_class(name)
    with pytest.raises(ValueError, match="is no model class of this transformers"):
        model_class(config(hf.LlamaConfig), name)
    with pytest.raises(ValueError, match="this transformers has no such class"):
        model_class(config(hf.LlamaConfig, name or "Nothing"))


def test_the_caller_may_choose():
    reward = config(hf.LlamaConfig, "LlamaForSequenceClassification")
    for chosen in ("AutoModelForCausalLM", hf.AutoModelForCausalLM):
        assert model_class(reward, chosen) is hf.AutoModelForCausalLM
    for chosen in ("LlamaForTokenClassification", hf.LlamaForTokenClassification):
        assert model_class(reward, chosen) is hf.LlamaForTokenClassification
    with pytest.raises(ValueError, match="did you mean 'AutoModelForCausalLM'"):
        model_class(reward, "AutoModelForCasualLM")
    for wrong in ("BertForMaskedLM", "AutoModelForImageClassification", hf.AutoModelForSpeechSeq2Seq):
        with pytest.raises(ValueError, match=r"does not open models of type 'llama'; config.json names LlamaForSeq"):
            model_class(reward, wrong)
    with pytest.raises(ValueError, match="a class of transformers or its name"):
        model_class(reward, 3)


def test_the_text_part_of_a_config():
    llava = hf.LlavaConfig()
    assert text_config(llava) is llava.text_config and text_config(llava.text_config) is llava.text_config
    for both in (hf.BartConfig(), hf.T5Config()):
        assert text_config(both) is both
    several = hf.LlamaConfig()
    several.text_encoder, several.decoder = hf.BertConfig(), hf.GPT2Config()
    assert text_config(several) is several.decoder


HEADLESS = {
    "a classifier": hf.LlamaForSequenceClassification,
    "a masked LM": hf.BertForMaskedLM,
    "a causal LM that looks both ways": hf.BertLMHeadModel,
    "a base model": hf.LlamaModel,
    "an encoder-decoder": hf.BartForConditionalGeneration,
}


@pytest.mark.parametrize("name", HEADLESS)
def test_figures_that_a_class_does_not_have_are_refused(name, tmp_path):
    model = small_model(HEADLESS[name])
    assert predicts_next_token(model) is (name == "an encoder-decoder")
    with pytest.raises(ValueError, match="perplexity "):
        evaluate_text(model, IDS)
    with pytest.raises(ValueError, match="perplexity "):
        evaluate_text(tiny("llama"), IDS, model)
    with pytest.raises(ValueError, match="evaluation "):
        evaluate(model, texts=Text("x", ["x"]), tokenizer=lambda text, **_: {"input_ids": [5] * 64}, length=8)
    prune(model, make_plan(model, MAGNITUDE))
    save_sparse(model, tmp_path / "sparse")
    for given in (model, tmp_path / "sparse"):
        with pytest.raises(ValueError, match=r"recover .* SparsityCallback"):
            recover(given, IDS, "full", output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    if name != "an encoder-decoder":
        for allocator in ("race", "search", "msp"):
            with pytest.raises(ValueError, match=f"allocator '{allocator}' needs next-token predictions"):
                make_plan(model, SparsityConfig(0.5, allocator=allocator), IDS)
        with pytest.raises(ValueError, match="a certificate needs next-token predictions"):
            certify(model, model, model, IDS)


def test_those_that_predict():
    decoder = small_model(hf.BertLMHeadModel)
    decoder.config.is_decoder = True
    for model in (decoder, tiny("llama"), tiny("llava"), tiny("whisper"), tiny("t5")):
        assert predicts_next_token(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reward model, a causal one and a model that sees."""
    home = tmp_path_factory.mktemp("classes")
    small_model(hf.LlamaForSequenceClassification).save_pretrained(home / "reward")
    tiny("llama").save_pretrained(home / "causal")
    tiny("llava").save_pretrained(home / "llava")
    return home


def test_no_weight_of_a_loaded_model_is_new(folders):
    with pytest.raises(
        ValueError, match=r"has no weights for 1 parameters of LlamaForCausalLM, such as lm_head.weight"
    ):
        load_model(folders / "reward", auto_class="AutoModelForCausalLM")
    with pytest.raises(ValueError, match=r"such as score.weight, so they would be random"):
        SparseModel.from_pretrained(folders / "causal", auto_class="AutoModelForSequenceClassification")
    with pytest.raises(ValueError, match=r"lacks 1 parameters"):
        open_streamed(folders / "causal", auto_class="AutoModelForSequenceClassification")
    assert type(load_model(folders / "reward", auto_class="AutoModel")) is hf.LlamaModel
    assert type(open_streamed(folders / "reward", auto_class=hf.LlamaModel)) is hf.LlamaModel


def command(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


@pytest.mark.parametrize("more", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_a_head_is_kept_on_the_command_line(folders, tmp_path, capsys, more):
    out = tmp_path / "out"
    ask = ["--sparsity", "0.5", "--pruner", "magnitude", "--output"]
    command(capsys, "prune", folders / "reward", *ask, out, *more)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    dense, pruned = (hf.LlamaForSequenceClassification.from_pretrained(x) for x in (folders / "reward", out))
    assert torch.equal(dense.score.weight, pruned.score.weight)
    assert verify(out, against=folders / "reward").ok
    assert "50.0" in command(capsys, "inspect", out).out
    command(capsys, "inspect", out, "--model-class", "LlamaForSequenceClassification")
    (tmp_path / "text.txt").write_text("text")
    hf.AutoTokenizer.from_pretrained(demo.PATH).save_pretrained(out)
    error = command(capsys, "eval", out, "--text", tmp_path / "text.txt", code=2).err
    assert "needs next-token predictions, and LlamaForSequenceClassification makes none" in error
    assert not (out / "sparsity_metrics.json").exists()
    error = command(capsys, "prune", folders / "reward", *ask, tmp_path / "x", "--model-class", "Trainer", code=2).err
    assert "'Trainer' is no model class" in error and len(error) < 400 and not (tmp_path / "x").exists()
    error = command(capsys, "prune", folders / "reward", *ask, tmp_path / "x", "--model-class", "BertModel", code=2).err
    assert "does not open models of type 'llama'" in error and len(error) < 400
    error = command(capsys, "inspect", out, "--model-class", "LlamaForCausalLM", code=2).err
    assert "lacks 1 parameters" in error


TOWER = "model.vision_tower."


@pytest.mark.parametrize("offload", [None, "stream"])
def test_a_tower_is_pruned_on_request(folders, tmp_path, offload):
    """The plan remembers it, so that whatever reads the plan later finds the same layers."""
    asked = SparsityConfig(0.5, pruner="magnitude", include="vision")
    assert SparsityConfig.from_dict(asked.to_dict()) == asked and asked.to_dict()["include"] == ["vision"]
    both = SparseModel.from_pretrained(
        folders / "llava", sparsity_config=asked, output_dir=tmp_path / "both", offload=offload
    )
    text = SparseModel.from_pretrained(
        folders / "llava", sparsity_config=MAGNITUDE, output_dir=tmp_path / "text", offload=offload
    )
    for folder, towers in (("both", True), ("text", False)):
        plan = Plan.load(tmp_path / folder)
        assert any(name.startswith(TOWER) for name in plan.layers) is towers
        assert ("include" in plan.config) is towers
        again = SparseModel.from_pretrained(tmp_path / folder)
        assert set(measure_sparsity(again).layers) == set(plan.layers)
        zeros = [
            float((p == 0).float().mean()) for n, p in again.named_parameters() if n.startswith(TOWER) and p.ndim == 2
        ]
        assert (max(zeros) > 0.4) is towers
        assert verify(tmp_path / folder, against=folders / "llava").ok
    assert set(both.config.sparsity_config["layers"]) > set(text.config.sparsity_config["layers"])


def test_parts_that_are_not_there(capsys, folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"include='audio': LlavaForConditionalGeneration has no such part; it has vision"
    ):
        make_plan(tiny("llava"), SparsityConfig(0.5, pruner="magnitude", include=("audio",)))
    with pytest.raises(ValueError, match="no towers beside its language model"):
        make_plan(tiny("llama"), SparsityConfig(0.5, pruner="magnitude", include="vision"))
    with pytest.raises(ValueError, match="some of vision, audio are expected"):
        SparsityConfig(0.5, include="visual")
    reasons = find_layers(tiny("llava")).skipped.values()
    assert 'not part of the language model (include="vision" prunes it)' in reasons
    ask = ["prune", folders / "llava", "--sparsity", "0.5", "--pruner", "magnitude", "--include", "vision", "--output"]
    command(capsys, *ask, tmp_path / "out")
    assert any(name.startswith(TOWER) for name in Plan.load(tmp_path / "out").layers)


def test_the_class_for_recover_may_be_named(tmp_path, capsys):
    """A sparse folder that names a class which this transformers does not have."""
    model = tiny("llama")
    prune(model, make_plan(model, MAGNITUDE))
    save_sparse(model, tmp_path / "sparse")
    file = tmp_path / "sparse/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["OfTheFuture"]}))
    with pytest.raises(ValueError, match=r"names OfTheFuture .* \(--model-class, auto_class=\)"):
        recover(tmp_path / "sparse", IDS, "full", output_dir=tmp_path / "out", steps=1, batch=1)
    for _ in range(2):  # the second time it is complete
        done = recover(
            tmp_path / "sparse",
            IDS,
            "full",
            output_dir=tmp_path / "out",
            steps=1,
            batch=1,
            auto_class="LlamaForCausalLM",
        )
        assert type(done) is hf.LlamaForCausalLM
    ask = ["recover", tmp_path / "sparse", "--data", tmp_path / "x.txt", "--output", tmp_path / "new", "--model-class"]
    assert "'Trainer' is no model class" in command(capsys, *ask, "Trainer", code=2).err
    assert not (tmp_path / "new").exists()
