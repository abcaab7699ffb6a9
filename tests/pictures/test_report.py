"""The page of a race: its numbers are the plan's, it needs nothing from elsewhere, and hostile names stay text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from hf_sparsity.pictures import report
from hf_sparsity.pictures.compare import Amounts, measured, side_by_side
from hf_sparsity.pictures.files import check_page
from hf_sparsity.pictures.heatmaps import draw_for_page
from hf_sparsity.pictures.panels import Dots, Heat, brief, round_ticks
from hf_sparsity.plan import LayerPlan, Plan
from hf_sparsity.race_record import RaceDetails
from tests.pictures.pages import Page, check_harmless

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def layers_of(blocks, projections=PROJECTIONS, stack="model.layers"):
    return [f"{stack}.{b}.{p}" for b in range(blocks) for p in projections]


def row(name, kind, values, gain):
    value, low, high = gain
    return {
        "name": name,
        "kind": kind,
        "origin": {},
        "kl": list(values),
        "perplexity": math.exp(3 + values[-1]),
        "uniform_minus": {"value": value, "low": low, "high": high},
    }


def gained(uniform, chosen, spread):
    gain = {"value": uniform - chosen, "low": uniform - chosen - spread, "high": uniform - chosen + spread}
    return {"uniform": uniform, "chosen": chosen, "uniform_minus_chosen": gain}


CANDIDATES = (
    row("search", "search", (0.51, 0.52, 0.5301), (0.1702, 0.14, 0.2003)),
    row("owl(outlier=5.0) + atp", "mixture", (0.61, 0.62, 0.6304), (0.0699, 0.0405, 0.1106)),
    row("owl(outlier=5.0)", "single", (0.6407, 0.6508, 0.6609), (0.0394, -0.0107, 0.0808)),
    row("uniform", "uniform", (0.71, 0.705, 0.7003), (0.0, 0.0, 0.0)),
    row("farms", "single", (5.4509,), (-4.7409, -5.0011, -4.3012)),
)


def raced(names=None, winner="search", candidates=CANDIDATES, story=True, measures=None):
    """A plan of a search over `names` (3 blocks of a Llama, else), with its story."""
    names = list(names or layers_of(3))
    sparsities = {n: round(0.55 + 0.3 * i / len(names), 4) for i, n in enumerate(names)}
    curve = ((30_000, 0.62, 11.2), (41_000, 0.57, 14.6), (52_000, 0.53, 20.1), (60_000, 0.53, 23.5))
    chosen = {
        "by": "search",
        "metric": "kl",
        "winner": winner,
        "kind": "search",
        "slices": [2048, 16384, 65536],
        "confidence": 0.95,
        "seed": 0,
        "candidates": [dict(one) for one in candidates],
        "spent": {"evals": 321, "tokens": 6543210},
        "search": {"generations": 12, "stopped": "the budget is spent", "curve": [list(p[:2]) for p in curve[:3]]},
        "data": {"statistics": 7, "selection": 6, "certificate": 4, "sha256": "a1" * 32},
        "certificate": {
            "kl": gained(0.7324, 0.5233, 0.0671),
            "perplexity": gained(41.2412, 34.4292, 5.5),
            "sequences": 4,
            "predictions": 1234,
            "confidence": 0.95,
            "resamples": 1000,
            "seed": 0,
            "of": "masks",
            "data": {"sha256": "b2" * 32},
        },
    }
    told = RaceDetails(
        {one["name"]: {n: s if one["name"] == winner else 0.7 for n, s in sparsities.items()} for one in candidates},
        measures or {"uniform": dict.fromkeys(names, 0.0), "owl(outlier=5.0)": {n: 0.1 + 0.1 * (i // 4) for i, n in enumerate(names)},
                     "fisher": {n: 10.0 ** (-i % 5) for i, n in enumerate(names)}},
        curve,
        29.4,
    )  # fmt: skip
    return Plan(
        {"sparsity": 0.7, "allocator": {"name": "search", "candidates": []}, "pruner": {"name": "wanda"}},
        {n: LayerPlan(s, 1000) for n, s in sparsities.items()},
        {"type": "llama", "name": "tiny", "layers": "c3" * 32, "weights": "d4" * 32},
        {"sequences": 13, "tokens": 1664, "sha256": "e5" * 32},
        {"hf_sparsity": "0.1", "torch": "2.0"},
        chosen,
        story=told if story else None,
    )


# ---- the page


@pytest.fixture(scope="module")
def text():
    """The page of `raced()`; drawing one takes a second."""
    return report.page(raced())


def test_its_numbers_are_the_plans(text):
    plan = raced()
    words = Page(text).words
    for one in CANDIDATES:
        for value in one["kl"]:
            assert f"{value:.4f}" in words, one["name"]
        assert f"{one['perplexity']:.2f}" in words
        gain = one["uniform_minus"]
        assert (f"{gain['value']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}]" in words) == (one["kind"] != "uniform")
    for word in ("0.2091 [0.1420, 0.2762]", "6.8120 [1.3120, 12.3120]", "0.7324", "34.4292", "321", "6,543,210"):
        assert word in words, word
    for word in (
        "7 sequences",
        "6 sequences: 2,048, 16,384, 65,536 tokens",
        "4 sequences",
        "29.4 s, measuring included",
    ):
        assert word in words, word
    assert all(f"{digits * 8}…" in words for digits in ("a1", "b2", "c3", "d4", "e5")), "fingerprints"
    for tokens, value, seconds in plan.story.curve:
        assert f"{value:.4f} after {tokens:,} tokens, {seconds:.1f} s" in words
    for name, layer in plan.layers.items():
        block, place = re.fullmatch(r"(model\.layers\.\d+)\.\w+\.(\w+)", name).groups()
        assert f"{block} {place}: planned {100 * layer.sparsity:.2f} %" in words
        assert f"{block} {place}: Fisher information {plan.story.measures['fisher'][name]:.4g}" in words
        assert f"{block}: outlier ratio (% of weights) {plan.story.measures['owl(outlier=5.0)'][name]:.4g}" in words


def test_the_winner_is_marked_and_said_in_words(text):
    marked = re.findall(r'<tr class="winner"><th scope="row">(.*?)</th>', text)
    assert marked == ["search <strong>★ winner</strong>"]
    words = " ".join("".join(Page(text).words).split())
    assert "search wins over 4 other plans" in words and "KL 0.5301 where uniform has 0.7003, on 65,536 tokens" in words
    assert "it is better than uniform beyond noise (KL 0.2091 [0.1420, 0.2762] lower)" in words
    uniform = report.page(raced(winner="uniform"))
    assert "</strong> wins over 4 other plans of the same sparsity: none of them is better beyond noise." in uniform
    worse = raced()
    worse.chosen["certificate"]["kl"] = gained(0.5, 0.6, 0.05)
    assert "it is worse than uniform (KL -0.1000" in report.page(worse)


def test_rounds_that_a_plan_was_not_in_are_dashes(text):
    (cells,) = re.findall(r"<tr><th[^>]*>farms</th>(.*?)</tr>", text, flags=re.DOTALL)
    assert re.findall(r'<td class="number">(.*?)</td>', cells)[1:4] == ["5.4509", "–", "–"]


def test_it_loads_and_runs_nothing(text):
    check_harmless(text)
    check_harmless(report.page(raced(story=False)))


def test_everything_can_be_read_without_eyes(text):
    drawings = re.findall(r"<svg[^>]*>", text)
    assert len(drawings) == 4 and all('role="img"' in tag and re.search(r'aria-label="[^"]+"', tag) for tag in drawings)
    assert text.count("<table>") == text.count('<thead><tr><th scope="col">') == 2
    assert re.findall(r"<h(\d)>", text)[0] == "1" and text.count("<h1>") == 1 and '<html lang="en">' in text


def test_hostile_names_stay_text():
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    names = [f"h.{b}.{evil}{i}" for b in range(3) for i in range(2)]
    candidates = [dict(one, name=f"{evil}{one['name']}") for one in CANDIDATES]
    candidates[-1]["kind"] = evil
    measures = {f"{evil}": {n: float(i) for i, n in enumerate(names)}, f"owl{evil}": {n: float(n[2]) for n in names}}
    plan = raced(names, f"{evil}search", candidates, measures=measures)
    plan.chosen["sources"] = {evil: {"sequences": 2, "uniform": 0.5, "chosen": 0.4}}
    plan.chosen["search"]["stopped"] = plan.chosen["by"] = evil
    plan = replace(
        plan,
        config={**plan.config, evil: {"name": evil, evil: [evil]}, "pattern": "unstructured"},
        model={**plan.model, "name": evil, evil: evil},
        versions={evil: evil},
    )
    for one in (plan, replace(plan, story=None)):
        page = check_harmless(report.page(one))
        assert sum("<script>alert(1)</script>" in word for word in page.words) >= 15


def test_without_a_story_there_is_what_the_plan_has():
    text = report.page(raced(story=False))
    assert "tokens through the model" in text and "seconds since the start" not in text
    assert "What the allocators measured" not in text and text.count("<svg") == 3
    race = raced(story=False)
    del race.chosen["search"]
    assert "The search over time" not in report.page(race)


def test_only_a_race_has_a_report_and_its_text_is_the_same_again(tmp_path, text):
    with pytest.raises(ValueError, match="not made by a race or search"):
        report.draw_report(replace(raced(), chosen=None), tmp_path / "x.html")
    assert not list(tmp_path.iterdir())
    assert report.draw_report(raced(), tmp_path / "x.html").read_text("utf-8") == text
    odd = replace(raced(), model={"name": "half a letter \ud800"})
    assert "half a letter ?" in report.draw_report(odd, tmp_path / "y.html").read_text("utf-8")


def test_divergence_by_source_is_shown_where_it_is_recorded(text):
    plan = raced()
    assert "By source of text" not in text
    plan.chosen["sources"] = {"web": {"sequences": 3, "uniform": 0.41239, "chosen": 0.31239}}
    words = Page(report.page(plan)).words
    assert {"By source of text", "web", "KL, uniform", "0.4124", "0.3124"} <= set(words)
    plan.chosen["sources"]["web"]["uniform"] = "<b>much</b>"
    with pytest.raises(ValueError, match="uniform of a measurement"):
        report.page(plan)


# ---- numbers


@pytest.mark.parametrize(("value", "text"), [(1e-7, "1e-7"), (2.5e12, "2.5e12"), (0.05, "0.05"), (123456.0, "1.23e5")])
def test_numbers_in_a_few_letters(value, text):
    assert brief(value) == text
    assert round_ticks(0, 60_000) == [0, 20_000, 40_000, 60_000]


# ---- plans side by side, and measures


def test_plans_share_one_scale_and_say_who_they_are():
    plan = raced()
    picture = side_by_side(plan, {"one": plan.story.plans["search"], "two": plan.story.plans["uniform"]})
    assert [panel.title for panel in picture.panels] == ["one", "two"]
    assert len({(panel.low, panel.high) for panel in picture.panels}) == 1 and picture.panels[0].high > 0.8
    assert {cell[0] for row in picture.panels[1].cells for cell in row} == {0.7}
    assert [cell[0] for row in picture.panels[0].cells for cell in row] == [x.sparsity for x in plan.layers.values()]


def test_experts_are_a_mean_and_stacks_stay_apart():
    names = [f"model.layers.{b}.mlp.experts.up_proj[{e}]" for b in range(2) for e in range(4)]
    plan = raced(names)
    picture = side_by_side(plan, {"x": {n: 0.5 if n.endswith("[0]") else 0.9 for n in names}})
    assert picture.panels[0].cells[0][0][0] == pytest.approx(0.8) and "means, weighted by size" in picture.notes[0]
    numbers = measured(plan, {"fisher": {n: float(i + 1) for i, n in enumerate(names)}})
    assert "the mean of 4 layers" in report.page(
        raced(names, measures={"fisher": dict(zip(names, range(1, 9), strict=True))})
    )
    assert [row[0][0] for row in numbers.panels[0].cells] == [2.5, 6.5]
    t5 = [*layers_of(2, ("a.q",), "encoder.block"), *layers_of(2, ("a.q", "b.k"), "decoder.block")]
    page = report.page(raced(t5))
    assert ">encoder 0<" in page and ">decoder 0<" in page


def test_a_block_with_one_number_is_a_dot_and_with_several_a_colour():
    names = layers_of(3)
    block = {n: float(n.split(".")[2]) for n in names}
    wide = {n: 10.0 ** (i - 6) for i, n in enumerate(names)}
    some = {n: float(i) for i, n in enumerate(names) if not n.endswith("q_proj")}
    same = dict.fromkeys(names, 3.0)
    picture = measured(
        raced(names), {"owl(outlier=5.0)": block, "fisher": wide, "lsa": some, "uniform": same, "atp": {}}
    )
    dots, logarithmic, holes = picture.panels
    assert isinstance(dots, Dots) and dots.title == "owl(outlier=5.0)\noutlier ratio (% of weights)"
    assert isinstance(logarithmic, Amounts) and logarithmic.log and logarithmic.tick(logarithmic.low) == "1e-6"
    assert [cell[0] for cell in logarithmic.cells[0]] == pytest.approx([-6, -5, -4, -3])
    assert isinstance(holes, Heat) and not holes.log and holes.cells[0][0] is None and holes.tick(holes.high) == "11"
    assert all(len(cell[1]) <= 6 for row in logarithmic.cells for cell in row)


def test_six_plans_of_eighty_blocks_stand_side_by_side():
    plan = raced(layers_of(80, [f"mlp.{letter}_proj" for letter in "abcdefg"]))
    drawing = draw_for_page(side_by_side(plan, plan.story.plans))
    assert drawing.width < 72 * 14 and drawing.height < 72 * 17, "points: it fits beside and below each other"
    assert len(report.page(plan)) < 2**20


# ---- files, and what hangs on a plan


def test_where_a_report_can_go(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.html"):
        check_page(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match="does not exist; make it"):
        check_page(tmp_path / "nowhere" / "x.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_page(tmp_path / "folder.html")
    (tmp_path / "old.html").write_text("old")
    with pytest.raises(ValueError, match=r"exists; choose another name, or remove it \(--overwrite\)"):
        check_page(tmp_path / "old.html")
    assert check_page(tmp_path / "old.html", overwrite=True).read_text() == "old"


def test_a_story_is_json_and_no_part_of_the_plans(tmp_path):
    plan = raced()
    assert RaceDetails.from_dict(json.loads(json.dumps(plan.story.to_dict()))) == plan.story
    assert "story" not in plan.to_dict() and "measures" not in json.dumps(plan.to_dict())
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.story is None and loaded == plan and plan.with_target(0.5).story is None
