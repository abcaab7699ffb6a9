"""`--calibration` with several sources: how they are written, and what prune prints, writes and checks again."""

from __future__ import annotations

import json

import pytest

from hf_sparsity import demo
from hf_sparsity.cli.arguments import parse_source
from hf_sparsity.cli.main import main

SMALL = ["--sequences", "8", "--length", "64"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4", {"data": "c4"}),
        ("c4@0.5", {"data": "c4", "weight": 0.5}),
        ("c4@2", {"data": "c4", "weight": 2}),
        ("web=c4@1e-1", {"data": "c4", "weight": 0.1, "name": "web"}),
        ("web=allenai/c4", {"data": "allenai/c4", "name": "web"}),
        ("self@0.25", {"data": "self", "weight": 0.25}),
        ("c4@nan", {"data": "c4", "weight": pytest.approx(float("nan"), nan_ok=True)}),
        ("me@home.txt@0.5", {"data": "me@home.txt", "weight": 0.5}),
        ("@0.5", {"data": "@0.5"}),
        ("=c4", {"data": "=c4"}),
        ("x" * 5000 + "@1", {"data": "x" * 5000, "weight": 1}),
    ],
)
def test_a_source_in_words(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize(("text", "weight"), [("c4@half", "half"), ("me@home.txt", "home.txt"), ("c4@true", "true")])
def test_a_weight_that_is_no_number(text, weight):
    with pytest.raises(ValueError, match=f"{text}: '{weight}' is no weight, and there is no file"):
        parse_source(text)


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.txt", "notes@2", "a=b@3"):
        (tmp_path / name).touch()
        assert parse_source(name) == {"data": name}
        assert parse_source(f"x={name}") == {"data": name, "name": "x"}
    assert parse_source("notes@2@0.5") == {"data": "notes@2", "weight": 0.5}
    assert parse_source("x=a=b.txt@0.5") == {"data": "a=b.txt", "name": "x", "weight": 0.5}
    assert parse_source("a=b.txt@0.5") == {"data": "a=b.txt", "weight": 0.5}


@pytest.fixture
def files(tmp_path):
    """Two texts."""
    texts = [text for _, text in demo.texts("calibration")]
    for name, part in (("a.txt", texts[:6]), ("b.txt", texts[6:12])):
        (tmp_path / name).write_text("\n\n".join(part))
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_prune_prints_and_writes_the_divergence_of_each_source(files, tmp_path, capsys):
    a, b = files
    output = tmp_path / "sparse"
    mix = ["--calibration", f"{a}@0.5", f"second={b}@0.25", "--calibration", "self@0.25"]
    assert main(["prune", "demo", "--sparsity", "0.6", *mix, *SMALL, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    report = json.loads((output / "sparsity_report.json").read_text())
    assert {n: (x["weight"], x["sequences"]) for n, x in report["sources"].items()} == {
        "a.txt": (0.5, 1),
        "second": (0.25, 1),
        "self": (0.25, 1),
    }
    lines = [line.split() for line in said.splitlines()]
    for name, one in report["sources"].items():
        shown = [one["kl"], one["perplexity"]["dense"], one["perplexity"]["pruned"]]
        numbers = [f"{value:.{digits}f}" for value, digits in zip(shown, (4, 2, 2), strict=True)]
        assert [name, f"{100 * one['weight']:.1f}", "1", *numbers] in lines


def test_a_pruner_that_needs_no_text_is_reported_on_too(files, tmp_path, capsys):
    command = ["prune", "demo", "--sparsity", "0.6", "--pruner", "magnitude", *SMALL, "--json"]
    assert main([*command, "--calibration", *files, "--output", str(tmp_path / "sparse")]) == 0
    assert list(json.loads(capsys.readouterr().out)["sources"]) == ["a.txt", "b.txt"]
    assert main([*command, "--calibration", files[0], "--output", str(tmp_path / "other")]) == 0
    assert json.loads(capsys.readouterr().out)["sources"] == {}


def test_a_race_on_a_mix_and_its_certificate_again(files, tmp_path, capsys):
    plan, sparse = str(tmp_path / "plan.json"), str(tmp_path / "sparse")
    mix = ["--calibration", files[0], "self", "--sequences", "12", "--length", "64"]
    race = ["race", "demo", "--sparsity", "0.7", "--candidates", "qkvo", *mix, "--output", plan]
    assert main(race) == 0
    assert main(["prune", "demo", "--plan", plan, *mix, "--output", sparse]) == 0
    assert "of the pruned model, there: kl" in capsys.readouterr().out
    check = ["verify", sparse, "--certificate", *mix]
    assert main([*check, "--against", "demo"]) == 0
    assert "the same text" in capsys.readouterr().out
    assert main(check) == 2
    assert "samples of the dense model; give it with --against" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (["c4@0"], "source c4: weight=0 must be a number, above 0"),
        (["c4@nan"], "weight=nan"),
        (["a=c4", "a=wikitext2"], "two sources of the calibration mix are called 'a'"),
        (
            ["self", "gone.txt@0.5"],
            "source 'gone.txt' of the calibration mix: calibration data 'gone.txt' cannot be read",
        ),
        (["self"] * 5, "8 sequences are too few for a mix of 5 sources"),
    ],
)
def test_mistakes(mix, message, tmp_path, capsys):
    command = ["prune", "demo", "--sparsity", "0.6", *SMALL, "--output", str(tmp_path / "out"), "--calibration", *mix]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_chats_that_the_template_does_not_take_are_exit_code_2(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    tokenizer = AutoTokenizer.from_pretrained(demo.PATH)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    AutoModelForCausalLM.from_pretrained(demo.PATH).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plan = [
        "plan",
        str(tmp_path / "model"),
        "--sparsity",
        "0.5",
        "--allocator",
        "owl",
        "--output",
        str(tmp_path / "p.json"),
    ]
    assert main([*plan, "--calibration", str(tmp_path / "chats.jsonl")]) == 2
    shown = capsys.readouterr().err
    assert "calibration document 0: the tokenizer's chat template does not take its messages" in shown
    assert "System role not supported" in shown and "Traceback" not in shown
    assert main([*plan, "--calibration", str(tmp_path / "chats.jsonl"), "--length", "99999"]) == 2
    assert "tokens are longer than the" in capsys.readouterr().err
    assert main([*plan, "--calibration", str(tmp_path / "chats.jsonl"), "--column", "text"]) == 2
    assert "no column 'text'; it has messages" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()
