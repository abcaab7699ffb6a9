"""Model cards: every number from the files, the same bytes again, metadata that the Hub takes, nothing that breaks out."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from hf_sparsity import SparsityConfig, make_plan, pack, prune, save_sparse
from hf_sparsity.allocators import ALLOCATORS, ROW_ALLOCATORS
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.cli.loading import sparsity_config
from hf_sparsity.cli.main import build_parser
from hf_sparsity.evaluation.metrics import Interval, Metrics, Score, TaskAgainst, TaskRecord, TextAgainst, TextRecord
from hf_sparsity.plan import read_json, write_json
from hf_sparsity.pruners import PRUNERS
from hf_sparsity.publish.card.citations import PAPERS, RECOVERY
from hf_sparsity.publish.card.commands import RECOVER, commands
from hf_sparsity.publish.card.make_card import CARD, PLOT, make_card
from hf_sparsity.publish.card.model_facts import read_facts
from hf_sparsity.recovery.methods import METHODS, TrainToSparsity
from tests.conftest import tiny, tiny_batch
from tests.tools import row_and_column

CARDS = sorted((Path(__file__).parents[3] / "model_cards").glob("*/README.md"))


@pytest.fixture
def picture():
    """Asked for by the tests that draw."""


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Without matplotlib a card has a table in place of the picture, which takes most of the time."""
    if "picture" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder: random Llama, 60 % by OWL and Wanda, one file."""
    return sparse(tmp_path_factory.mktemp("models") / "pruned", SparsityConfig(0.6, allocator="owl"))


@pytest.fixture
def folder(pruned, tmp_path):
    """A copy to write into."""
    return Path(shutil.copytree(pruned, tmp_path / "model"))


def sparse(path: Path, config: SparsityConfig) -> Path:
    model = tiny("llama", torch.bfloat16)
    model.config._name_or_path = "/home/somebody/secret/Tiny_Llama"
    batches = [tiny_batch("llama")]
    return save_sparse(model, path, report=prune(model, make_plan(model, config, batches), batches))


def text(name: str = "wikitext2", weights: str = "abc", **changes) -> TextRecord:
    against = TextAgainst(
        "dense",
        "dense weights",
        perplexity=Interval(10.125, 9.875, 10.375),
        ratio=Interval(1.2345, 1.2, 1.25),
        kl=Interval(0.21875, 0.2, 0.25),
        top1=Interval(0.8125, 0.75, 0.875),
    )
    fields = {
        "split": "test",
        "data": {"sha256": "0"},
        "length": 128,
        "windows": 412,
        "unit": "document",
        "documents": 9,
        "predictions": 52324,
        "perplexity": Interval(12.499, 12.25, 12.75),
        "against": against,
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 0,
        "versions": {},
    }
    return TextRecord(name=name, weights=weights, **fields | changes)


def task(weights: str = "abc") -> TaskRecord:
    metrics, dense = {"acc": Score(0.25, 0.0625)}, {"acc": Score(0.5, 0.0625)}
    against = TaskAgainst("dense", "dense weights", dense, {"acc": Interval(-0.25, -0.375, -0.125)})
    return TaskRecord("arc_easy", 1.0, 0, None, 100, weights, metrics, against, 0.95, 1000, 0, "0.4.13", {})


def row(card: str, start: str) -> list[str]:
    """The cells of the table row that starts so."""
    return next(
        [c.strip() for c in line.strip("|").split("|")]
        for line in card.splitlines()
        if start in line and line[0] == "|"
    )


# ---- what it says


def test_numbers_are_those_of_the_files(folder):
    Metrics((text(),), (task(),)).save(folder)
    make_card(folder, license="mit")
    card = (folder / CARD).read_text()
    plan = read_json(folder / "config.json")["sparsity_config"]
    weights = load_file(folder / "model.safetensors")
    zeros = sum(int((weights[f"{name}.weight"] == 0).sum()) for name in plan["layers"])
    size = sum(layer["size"] for layer in plan["layers"].values())
    assert (
        f"**{100 * zeros / size:.1f} %" in card and f"({zeros:,} of {size:,} weights in {len(plan['layers'])}" in card
    )
    assert row(card, "perplexity (lower") == [
        "perplexity (lower is better)",
        "10.12 [9.88, 10.38]",
        "12.50 [12.25, 12.75]",
    ]
    assert row(card, "its ratio")[1:] == ["1", "1.23 [1.20, 1.25]"]
    assert row(card, "divergence from the dense model (")[1:] == ["0", "0.219 [0.200, 0.250]"]
    assert row(card, "same most likely")[1:] == ["100 %", "81.2 % [75.0 %, 87.5 %]"]
    assert row(card, "arc_easy")[1:] == ["`acc`", "0.500 ± 0.062", "0.250 ± 0.062", "-0.250 [-0.375, -0.125]"]
    assert "52,324 next-token predictions in 412 windows of 128 tokens" in card and "over 9 documents" in card
    assert "95 % intervals" in card and "1,000 resamples, seed 0" in card
    stored = sum(tensor.nbytes for tensor in weights.values())
    assert row(card, "dense: zeros")[1:] == [f"{stored / 1e6:.2f} MB", "measured: the files here"]
    assert plan["data"]["sha256"] in card and plan["model"]["weights"] in card and plan["versions"]["torch"] in card
    assert all(
        name in card for name in ("Yin", "Zico Kolter", "arXiv", "no training is recorded", "outside the blocks")
    )


@pytest.mark.parametrize(
    "config", [SparsityConfig(0.7), SparsityConfig(pattern="2:4"), SparsityConfig(0.6, pattern="*:8")]
)
def test_the_size_that_is_computed_is_the_size_that_packing_gives(config, tmp_path):
    dense = sparse(tmp_path / "dense", config)
    packed = pack(dense, tmp_path / "packed")
    one, two = read_facts(dense).sizes, read_facts(packed).sizes
    assert (one.stored, two.stored) == ("dense", "bitmask") and one.dense == two.dense == stored(dense)
    assert one.bitmask == two.bitmask == pytest.approx(stored(packed), abs=0)


def stored(folder: Path) -> int:
    return sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())


def test_a_packed_folder_says_how_it_is_loaded(folder, tmp_path):
    make_card(folder)
    assert "other package is needed" in (folder / CARD).read_text()
    packed = pack(folder, tmp_path / "packed")
    card = make_card(packed)
    assert (
        "import hf_sparsity" in card.text and "other package is needed" not in card.text and "bitmask" in card.data.tags
    )


def test_no_evaluation_is_said_so(folder):
    card = make_card(folder)
    assert "No evaluation of this model is recorded" in card.text and card.data.eval_results is None
    assert "## Quality" in card.text and "perplexity on" not in card.text.lower()


def test_a_text_without_the_dense_model(folder):
    Metrics((text(against=None, perplexity=Interval(12.5), split=None),)).save(folder)
    card = make_card(folder).text
    assert (
        row(card, "perplexity")[1] == "12.50" and "The dense model was not measured" in card and "brackets" not in card
    )


def test_recovery(folder):
    Metrics((text(),)).save(folder)
    before = make_card(folder)
    recovered(folder, method="lora", steps=200, tokens=49152, loss={"before": 3.5, "after": 2.75})
    card = make_card(folder)
    assert "recovered" in card.data.tags and "recovered" not in before.data.tags
    assert "200 steps and 49,152 tokens" in card.text and "from 3.500 to 2.750 nats" in card.text
    assert "Edward J. Hu" in card.text and "were trained again afterwards" in card.text
    assert "# Tiny_Llama-sparse60-owl-wanda-recovered\n" not in before.text


def recovered(folder: Path, **changes) -> None:
    config = read_json(folder / "config.json")
    done = {
        "method": "full",
        "options": {"length": 128, "batch": 8, "lr": 0.001, "seed": 3, "training": {}},
        "steps": 10,
        "tokens": 10240,
        "data": {"sequences": 12, "tokens": 1536, "sha256": "beef", "heldout": 2},
        "model": "weights before",
        "teacher": {"name": "dense", "weights": None},
        "versions": {"torch": "2"},
        "loss": {"before": 2.0, "after": 1.0},
        "previous": None,
    }
    config["sparsity_config"]["recovered"] = done | changes
    write_json(folder / "config.json", config)


def test_training_that_is_not_recorded_is_unknown(folder):
    """Nothing in a folder shows that nobody trained it in a loop of their own."""
    card = make_card(folder)
    assert "were trained again afterwards is unknown: no training is recorded" in card.text.replace("\n", " ")
    recovered(folder)
    assert "is unknown" not in make_card(folder).text


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("trainer", {}, "after pruning** (`trainer`): by transformers' Trainer, the zeros held at zero by `SparsityCallback`"),
        ("gradual", {"schedule": "cubic", "end": 4}, "while it was pruned** (`gradual`): by transformers' Trainer, "
         "`SparsityCallback` adding zeros while it went on (`schedule=cubic, end=4`)"),
        ("own loop", {}, "in a loop of the author's own, the zeros held at zero by `hold_zeros`"),
        ("adapter", {"adapters": "LORA"}, "adapters were merged into the weights (`adapters=LORA`)"),
        ("magic", {}, "a method that this release does not know"),
    ],
)  # fmt: skip
def test_training_outside_of_recover_is_told_from_its_record(folder, method, options, said):
    """Of it the steps are known, perhaps the losses, not the text."""
    nothing = {"tokens": None, "data": None, "teacher": None, "loss": {"before": None, "after": None}}
    recovered(folder, method=method, options=options, steps=6, evaluation={"before": 3.0, "after": 2.5}, **nothing)
    card = " ".join(make_card(folder).text.split())
    assert f"{said}; 6 steps. On evaluation data of that training the loss went from 3.000 to 2.500 nats" in card
    assert "The text is not recorded. Versions: `torch 2`" in card and "was the teacher" not in card
    assert "is unknown" not in card and "hf-sparsity recover sparse" not in card
    assert ("hf-sparsity prune BASE_MODEL" in card) == (method != "gradual")
    told = (
        "pruned during a training"
        if method == "gradual"
        else "Not all of the training below was done by `hf-sparsity recover`"
    )
    assert told in card


@pytest.mark.parametrize(
    ("architecture", "model_class", "reader"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM", "AutoTokenizer"),
        ("CodeOfTheirOwnForCausalLM", "AutoModelForCausalLM", "AutoTokenizer"),
        ("LlamaForSequenceClassification", "LlamaForSequenceClassification", "AutoTokenizer"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration", "AutoTokenizer"),
        ("LlavaForConditionalGeneration", "LlavaForConditionalGeneration", "AutoProcessor"),
        ("LlamaModel", "AutoModel", "AutoTokenizer"),
        ("os; import os #", "AutoModel", "AutoTokenizer"),
    ],
)
def test_the_card_loads_a_model_with_its_head(folder, architecture, model_class, reader):
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"architectures": [architecture]})
    assert (
        f"from transformers import {model_class}, {reader}\n\nmodel = {model_class}.from_pretrained("
        in make_card(folder).text
    )


def test_a_later_training_of_another_kind_ends_the_commands(folder):
    first = {"method": "full", "steps": 3, "options": {}, "data": None, "previous": None}
    recovered(folder, method="own loop", previous=first)
    lines = commands(read_facts(folder))
    assert [line[1] for line in lines] == ["prune", "recover"]
    recovered(folder, method="full", previous=first | {"method": "own loop"})
    assert [line[1] for line in commands(read_facts(folder))] == ["prune"]
    # those that begin with a dense model have no `prune` before them, so they are no line of a sparse model's commands
    assert set(RECOVER) == {name for name, method in METHODS.items() if not issubclass(method, TrainToSparsity)}


@pytest.mark.parametrize(
    ("quantized", "shown", "tag"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits", "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits", "gptq"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao", "torchao"),
        ({}, "an unknown method", "an-unknown-method"),
    ],
)  # fmt: skip
def test_a_folder_that_another_method_quantized_is_described_as_that(folder, quantized, shown, tag):
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"quantization_config": quantized})
    card = make_card(folder, base_model="o/b")
    assert f"quantized by another method (`{shown}`)" in card.text and tag in card.data.tags
    assert card.data.base_model_relation == "quantized" and "bitmask" not in card.data.tags
    for wrong in (
        "bitmask",
        "hf-sparsity pack",
        "unpack",
        "no other package",
        "ordinary transformers model",
        "as large as",
    ):
        assert wrong not in card.text
    assert f"`{shown}` decides how the weights are stored; they take" in card.text.replace("\n", " ")


def test_paths_of_this_machine_stay_here(folder):
    make_card(folder)
    card = (folder / CARD).read_text()
    assert "Tiny_Llama" in card and "secret" not in card and "somebody" not in card and str(folder.parent) not in card


def test_without_matplotlib_there_is_a_table(folder):
    card = make_card(folder).text
    assert not (folder / PLOT).exists() and PLOT not in card
    assert row(card, "`model.layers.0`")[1:] != [] and "%" in row(card, "`model.layers.2`")[3]


# ---- rendered again


def test_the_same_bytes_again(folder, picture):
    Metrics((text(),), (task(),)).save(folder)
    given = {
        "license": "apache-2.0",
        "language": ["en", "code"],
        "datasets": "allenai/c4",
        "base_model": "o/b",
        "name": "me/x",
    }
    returned = make_card(folder, **given)
    first = [(folder / name).read_bytes() for name in (CARD, PLOT)]
    assert first[0] == str(returned).encode()
    make_card(folder)  # what people said once is kept
    assert [(folder / name).read_bytes() for name in (CARD, PLOT)] == first
    assert {key: getattr(returned.data, key) for key in ("license", "language", "datasets", "base_model")} == {
        "license": "apache-2.0",
        "language": ["en", "code"],
        "datasets": "allenai/c4",
        "base_model": "o/b",
    }
    assert "# me/x\n" in returned.text and 'from_pretrained("me/x")' in returned.text


def test_a_card_of_somebody_else_is_kept(folder):
    (folder / CARD).write_text("---\nlicense: mit\nlanguage: de\ntags:\n- mine\n---\n# By hand\n")
    with pytest.raises(ValueError, match=r"README.md was not made by hf_sparsity; pass overwrite"):
        make_card(folder)
    assert "By hand" in (folder / CARD).read_text() and not (folder / PLOT).exists()
    card = make_card(folder, overwrite=True)
    assert (card.data.license, card.data.language) == ("mit", "de") and "By hand" not in card.text


def test_what_the_dense_card_says(folder, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    assert make_card(folder, dense=dense).data.license is None
    (dense / CARD).write_text(
        "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\nlanguage: [en, de, '<b>']\ndatasets: ['../x']\n---\n"
    )
    card = make_card(folder, dense=dense)
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "llama3.1", ["en", "de"])
    assert card.data.datasets is None and card.data.base_model is None  # a folder is not on the Hub
    card = make_card(folder, license="mit")
    assert card.data.license == "mit" and "license_name" not in card.data.to_dict()


def test_a_dense_model_on_the_hub_is_asked_only_when_named(folder):
    config = read_json(folder / "config.json")
    config["sparsity_config"]["model"]["name"] = "some/model"
    write_json(folder / "config.json", config)
    card = make_card(folder)  # no network: the fixture would fail
    assert card.data.base_model == "some/model" and card.data.base_model_relation == "finetune"
    assert "[some/model](https://huggingface.co/some/model)" in card.text
    with pytest.raises(OSError, match=r"card of some/model cannot be read.*--license"):
        make_card(folder, dense="some/model")


@pytest.mark.parametrize(
    ("name", "value"), [("license", "MIT License!"), ("language", "English"), ("base_model", "../x"), ("name", "a b")]
)
def test_arguments_that_the_hub_would_refuse(folder, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not what the Hub takes"):
        make_card(folder, **{name: value})
    assert not (folder / CARD).exists()


def test_evaluations_of_other_weights_are_refused(folder):
    Metrics((text(), text("c4", weights="other"))).save(folder)
    with pytest.raises(ValueError, match="'wikitext2' and 'c4' are of different weights"):
        make_card(folder)
    Metrics((text(weights="weights before"),)).save(folder)
    recovered(folder)
    with pytest.raises(ValueError, match="evaluated before it was trained again"):
        make_card(folder)
    assert not (folder / CARD).exists()


def test_folders_that_are_no_sparse_model(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not a folder; give the folder of a sparse model"):
        make_card(tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing has no config\.json; give the folder of a sparse model"):
        make_card(tmp_path / "nothing")
    report = json.loads((folder / REPORT_FILE).read_text())
    report["layers"].popitem()
    write_json(folder / REPORT_FILE, report)
    with pytest.raises(ValueError, match="about other layers than the plan"):
        make_card(folder)
    write_json(folder / "config.json", {"model_type": "llama"})
    with pytest.raises(ValueError, match="no sparsity plan: prune the model first"):
        make_card(folder)


# ---- metadata


def check_metadata(data: dict) -> None:
    """What the Hub's specification asks of a card (hub-docs, modelcard.md; docs/hub/model-cards)."""
    repo = r"([\w-][\w.-]*/)?[\w-][\w.-]*"
    assert data["library_name"] == "transformers" and isinstance(data["pipeline_tag"], str)
    assert re.fullmatch(r"[a-z0-9.-]+", data.get("license", "mit"))
    assert all(isinstance(tag, str) and re.fullmatch(r"[\w.-]+", tag) for tag in data["tags"])
    assert len(set(data["tags"])) == len(data["tags"])
    assert re.fullmatch(repo, data.get("base_model", "a/b"))
    assert data.get("base_model_relation", "finetune") in ("adapter", "merge", "quantized", "finetune")
    for model in data.get("model-index", []):
        assert set(model) == {"name", "results"} and isinstance(model["name"], str)
        for result in model["results"]:
            assert result["task"]["type"] and result["dataset"]["name"]
            assert re.fullmatch(repo, result["dataset"]["type"])
            assert result["metrics"] and all({"type", "value"} <= set(metric) for metric in result["metrics"])
            assert all(isinstance(metric["value"], float) for metric in result["metrics"])


def test_metadata_go_through_the_hubs_own_classes(folder):
    Metrics((text(), text("my text.txt", split=None)), (task(),)).save(folder)
    written = make_card(folder, license="mit", base_model="o/b")
    data = metadata_load(folder / CARD)
    check_metadata(data)
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "Tiny_Llama-sparse60-owl-wanda" and len(results) == 7
    first = results[0]
    assert (first.task_type, first.dataset_type, first.dataset_config, first.dataset_split) == (
        "text-generation",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert (first.metric_type, first.metric_value, results[-1].metric_type) == ("perplexity", 12.499, "acc")
    assert {"owl", "wanda", "sparse", "pruned", "hf_sparsity", "unstructured", "sparsity-60"} <= set(data["tags"])
    assert str(ModelCard.load(folder / CARD)) == str(written) == (folder / CARD).read_text()


# ---- commands


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(0.5),
        SparsityConfig(pattern="2:4", pruner="sparsegpt", seed=7),
        SparsityConfig(
            0.6, pattern="*:8", allocator={"name": "alphapruning", "fit": "mid", "spread": 0.2}, pruner="magnitude"
        ),
        SparsityConfig(
            0.7, allocator={"name": "mrp", "outlier": 9.0}, row_allocator="trim", ignore=("q_proj", "*.mlp.*")
        ),
        SparsityConfig(0.55, allocator="msp", pruner={"name": "wanda", "variant": True}),
    ],
)
def test_the_command_asks_for_the_same_config(pruned, tmp_path, config):
    folder = with_config(pruned, tmp_path, config.to_dict())
    (command,) = commands(read_facts(folder))
    options = build_parser().parse_args(command[1:])
    assert sparsity_config(options) == config
    assert (options.command, options.model, options.calibration) == ("prune", "BASE_MODEL", ["CALIBRATION_TEXT"])
    assert (options.sequences, options.length) == (2, 24)


def with_config(pruned: Path, tmp_path: Path, config: dict) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    stored = read_json(pruned / "config.json")
    stored["sparsity_config"]["config"] = json.loads(json.dumps(config))
    write_json(folder / "config.json", stored)
    return folder


def test_what_the_command_line_cannot_say_goes_by_the_plan(pruned, tmp_path):
    config = SparsityConfig(0.6).to_dict() | {"allocator": {"name": "ramp", "slope": 0.2}}
    folder = with_config(pruned, tmp_path, config)
    (command,) = commands(read_facts(folder))
    options = build_parser().parse_args(command[1:])
    assert options.plan == "config.json" and options.sparsity is None
    card = make_card(folder).text
    assert "`ramp`: not part of hf_sparsity, and no paper is recorded" in card and "Zico Kolter" in card


def test_the_recovery_commands(folder):
    recovered(
        folder, method="lora", options={"length": 128, "batch": 4, "lr": 0.002, "rank": 8, "seed": 3, "accumulation": 2}
    )
    recovery = commands(read_facts(folder))[1]
    options = build_parser().parse_args(recovery[1:])
    assert (options.command, options.model, options.method, options.teacher) == (
        "recover",
        "sparse",
        "lora",
        "BASE_MODEL",
    )
    assert (options.steps, options.length, options.batch, options.lr, options.rank) == (10, 128, 4, 0.002, 8)
    assert (options.seed, options.accumulation, options.data) == (3, 2, ["CALIBRATION_TEXT"])
    recovered(
        folder,
        method="reconstruct",
        steps=None,
        data={"sequences": 138, "tokens": 138 * 128, "sha256": "beef", "heldout": 8},
    )
    options = build_parser().parse_args(commands(read_facts(folder))[1][1:])
    assert (options.method, options.steps) == ("reconstruct", 16)


def test_no_record_of_a_run_gives_no_command(folder):
    config = read_json(folder / "config.json")
    del config["sparsity_config"]["pruned"]
    write_json(folder / "config.json", config)
    assert commands(read_facts(folder)) == []
    assert "so no command is given" in make_card(folder).text


# ---- papers


def test_every_algorithm_has_its_paper():
    algorithms = [a for table in (ALLOCATORS, ROW_ALLOCATORS, PRUNERS) for a in table.values()]
    for algorithm in algorithms:
        assert algorithm.citation or not algorithm.paper.startswith("https://arxiv.org"), algorithm
        assert algorithm.citation is None or algorithm.citation.url == algorithm.paper
    assert {key for method in METHODS for key in RECOVERY.get(method, ())} <= set(PAPERS)
    papers = {a.citation for a in algorithms if a.citation} | set(PAPERS.values())
    assert len({paper.key for paper in papers}) == len({paper.url for paper in papers}) == len(papers)
    for paper in papers:
        assert paper.bibtex().count("{") == paper.bibtex().count("}") and "," not in paper.authors


# ---- strings that try to be something else

HOSTILE = "x`\n---\nlicense: evil\n---\n# Evil | <script>alert(1)</script> ![i](http://evil/i.png) ```\n<!-- "


def test_hostile_strings_stay_text(folder, picture):
    config, report = read_json(folder / "config.json"), read_json(folder / REPORT_FILE)
    plan = config["sparsity_config"]
    plan["model"].update(name=f"{HOSTILE}/{HOSTILE}", type=HOSTILE, weights=HOSTILE)
    plan["config"].update(
        allocator={"name": HOSTILE, HOSTILE: HOSTILE}, pruner={"name": HOSTILE}, ignore=[HOSTILE], seed=HOSTILE
    )
    plan["versions"] = {HOSTILE: HOSTILE}
    plan["data"] = {"sequences": HOSTILE, "tokens": HOSTILE, "sha256": HOSTILE}
    for data in (plan["layers"], report["layers"]):
        data[HOSTILE] = data.pop("model.layers.1.mlp.up_proj")
    report["layers"][HOSTILE]["note"] = HOSTILE
    report["skipped"] = {HOSTILE: HOSTILE}
    write_json(folder / "config.json", config)
    write_json(folder / REPORT_FILE, report)
    recovered(folder, method=HOSTILE, versions={HOSTILE: HOSTILE}, data={"sha256": HOSTILE, "sequences": HOSTILE})
    bad = task()
    bad = TaskRecord(**vars(bad) | {"name": HOSTILE, "metrics": {HOSTILE: Score(0.5)}, "harness": HOSTILE})
    Metrics((text(HOSTILE, split=HOSTILE, unit=HOSTILE),), (bad,)).save(folder)
    card = make_card(folder)
    check_metadata(metadata_load(folder / CARD))
    assert card.data.license is None and (folder / CARD).read_text().count("\n---\n") == 1
    tokens = list(every(MarkdownIt("commonmark").enable("table").parse(card.text)))
    assert [t.content.startswith("<!-- Rendered by hf_sparsity") for t in tokens if t.type.startswith("html")] == [True]
    assert [t.attrs["src"] for t in tokens if t.type == "image"] == [PLOT]
    headings = re.findall(r"^# .*$", "\n".join(t.content for t in tokens if t.type != "fence"), flags=re.MULTILINE)
    assert not headings and sum(t.type == "heading_open" and t.tag == "h1" for t in tokens) == 1
    assert all(t.attrs["href"].startswith("https://arxiv.org/abs/") for t in tokens if t.type == "link_open")
    first = (folder / CARD).read_bytes()
    make_card(folder)
    assert (folder / CARD).read_bytes() == first


def every(tokens):
    for token in tokens:
        yield token
        yield from every(token.children or [])


PLACES = [
    "sparsity_config.pruned",
    "architectures",
    "dtype",
    "quantization_config",
    "sparsity_config.recovered",
    "sparsity_config.config.ignore",
    "sparsity_config.config.allocator",
    "sparsity_config.config.pruner",
    "sparsity_config.config.seed",
    "sparsity_config.model.name",
    "sparsity_config.versions",
    "sparsity_config.data",
]


@pytest.mark.parametrize(
    ("where", "value"), row_and_column(PLACES, [[["a"]], 5, None, True, [], {}, "x", 1e308, {"a": 1}])
)
def test_values_of_other_types_are_no_crash(pruned, tmp_path, where, value):
    (tmp_path / "m").mkdir()
    config = read_json(pruned / "config.json")
    inside = config
    *path, last = where.split(".")
    for key in path:
        inside = inside[key]
    inside[last] = value
    write_json(tmp_path / "m" / "config.json", config)
    try:
        card = make_card(tmp_path / "m")
    except ValueError:
        return
    check_metadata({"pipeline_tag": "text-generation"} | yaml.safe_load(card.data.to_yaml()))


@pytest.mark.parametrize(
    "content", ["---\n- a\n- b\n---\n", "---\na: [\n---\n", "---\na: &x [*x]\nlicense: [*x]\n---\n"]
)
def test_damaged_metadata_of_the_dense_card(folder, tmp_path, content):
    (tmp_path / CARD).write_text(content)
    try:
        assert make_card(folder, dense=tmp_path).data.license is None
    except ValueError as error:
        assert "damaged" in str(error)


@pytest.mark.parametrize("name", ["demo", "/somewhere/hf_sparsity/demo", "/somewhere/hf_sparsity/demo/model"])
def test_the_embedded_model_is_called_demo(folder, name):
    """It has had a folder of its own since what lies beside a model is carried over."""
    config = read_json(folder / "config.json")
    config["sparsity_config"]["model"]["name"] = name
    write_json(folder / "config.json", config)
    facts = read_facts(folder)
    assert facts.is_demo and facts.base == "demo" and facts.name.startswith("demo-sparse60")


# ---- the cards of this repository


@pytest.mark.skipif(not CARDS, reason="model_cards/ is empty: python examples/make_model_cards.py")
def test_there_are_cards():
    names = {path.parent.name for path in CARDS}
    for sparsity in ("50-owl", "2of4", "60-owl", "70-owl"):
        assert {f"demo-sparse{sparsity}-wanda", f"demo-sparse{sparsity}-wanda-recovered"} <= names
    assert sum(file.stat().st_size for path in CARDS for file in path.parent.iterdir()) < 1.5e6


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_each_card_is_its_own_rendering(card, tmp_path, picture):
    folder = Path(shutil.copytree(card.parent, tmp_path / "again", ignore=shutil.ignore_patterns(CARD, PLOT)))
    make_card(folder, license="apache-2.0", language="code")
    assert (folder / CARD).read_bytes() == card.read_bytes()
    assert (folder / PLOT).read_bytes()[:8] == (card.parent / PLOT).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    check_metadata(metadata_load(card))
    assert "eval_results" not in card.read_text() and "model-index" in card.read_text()


def test_a_certificate_is_shown(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "folder")
    config = read_json(folder / "config.json")
    gain = {"value": 0.1133, "low": 0.0654, "high": 0.1612}
    one = {"uniform": 0.7324, "chosen": 0.6191, "uniform_minus_chosen": gain}
    chosen = {"winner": "owl | <b>", "certificate": {"predictions": 508, "kl": one, "perplexity": one}}
    config["sparsity_config"] |= {"chosen": chosen}
    write_json(folder / "config.json", config)
    text = str(make_card(folder))
    assert "| 0.732 | 0.619 | 0.113 [0.065, 0.161] |" in text and "508 predictions" in text and "`owl | <b>`" in text
    assert "Why this plan" not in str(make_card(shutil.copytree(pruned, tmp_path / "plain")))
    for damage in ({"predictions": "many"}, {"kl": None}, {"perplexity": {"uniform": 1}}):
        config["sparsity_config"]["chosen"] = chosen | {"certificate": chosen["certificate"] | damage}
        write_json(folder / "config.json", config)
        with pytest.raises(ValueError):
            make_card(folder)


def test_a_plan_from_another_model_says_what_it_gains_here(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "folder")
    config = read_json(folder / "config.json")
    there = {"uniform": 0.7, "chosen": 0.6, "uniform_minus_chosen": {"value": 0.1, "low": 0.05, "high": 0.15}}
    here = {"uniform": 0.8, "chosen": 0.9, "uniform_minus_chosen": {"value": -0.1, "low": -0.15, "high": -0.05}}
    checked = {"kl": here, "perplexity": here, "predictions": 2040, "pays": False, "made_on": "a/<b>"}
    config["sparsity_config"]["pruned"]["revalidation"] = checked
    write_json(folder / "config.json", config)
    alone = str(make_card(folder))
    assert "Why this plan" not in alone and "made on `a/<b>`" in alone
    assert "**it does harm**" in alone and "-0.100 [-0.150, -0.050]" in alone.replace("−", "-") and "2,040" in alone
    chosen = {"winner": "owl", "certificate": {"predictions": 508, "kl": there, "perplexity": there}}
    config["sparsity_config"] |= {"chosen": chosen}
    config["sparsity_config"]["pruned"]["revalidation"] = checked | {"pays": None, "made_on": ""}
    write_json(folder / "config.json", config)
    both = str(make_card(folder))
    assert "on the model it was made on, `owl` won" in both and "cannot be told from uniform" in both
    assert "made on `another model`" in both
