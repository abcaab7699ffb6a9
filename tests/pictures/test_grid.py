"""The numbers behind a picture: names, means, scales, and what stands beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_sparsity import demo
from hf_sparsity.pictures import heatmaps, panels
from hf_sparsity.pictures.grid import by_block_and_projection, make_grid, places, split_name
from hf_sparsity.pictures.panels import Dots, bounds, make_picture
from hf_sparsity.plan import LayerPlan, Plan
from tests.pictures.plans import PROJECTIONS, experts, llama, plan, report

# ---- names


def test_names():
    assert split_name("model.layers.3.mlp.up_proj") == ("model.layers.3", "mlp.up_proj")
    assert split_name("model.layers.3.mlp.experts.gate_up_proj[127]") == ("model.layers.3", "mlp.experts.gate_up_proj")
    assert split_name("model.layers.3.mlp.experts.7.up_proj") == ("model.layers.3", "mlp.experts.up_proj")
    assert split_name("encoder.block.0.layer.0.SelfAttention.q") == ("encoder.block.0", "layer.SelfAttention.q")
    assert split_name("transformer.blocks.1.ffn.2") == ("transformer.blocks.1", "ffn.2")
    assert split_name("lm_head") == ("", "lm_head")


@pytest.mark.parametrize(
    ("inside", "projections"),
    [
        (PROJECTIONS, ["q_proj", "o_proj", "up_proj", "down_proj"]),
        (["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        (
            ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "layer.2.DenseReluDense.wi"],
            ["SelfAttention.q", "EncDecAttention.q", "wi"],
        ),
        (
            ["mlp.up_proj", "mlp.shared_experts.up_proj", "mlp.experts.up_proj[0]", "mlp.experts.up_proj[1]"],
            ["mlp.up_proj", "shared_experts.up_proj", "experts.up_proj", "experts.up_proj"],
        ),
    ],
)
def test_a_projection_has_the_shortest_name_that_is_its_own(inside, projections):
    assert [p for _, p in places(f"h.0.{name}" for name in inside).values()] == projections


def test_means_are_weighted_by_size():
    names = {"h.0.mlp.experts.up[0]": 0.5, "h.0.mlp.experts.up[1]": 0.8, "h.1.mlp.experts.up[0]": 0.1}
    sizes = {"h.0.mlp.experts.up[0]": 100, "h.0.mlp.experts.up[1]": 200, "h.1.mlp.experts.up[0]": 50}
    table = by_block_and_projection(names, sizes)
    assert table == {"h.0": {"up": pytest.approx(0.7)}, "h.1": {"up": pytest.approx(0.1)}}


# ---- numbers


def test_experts_are_one_cell_with_their_range():
    grid = make_grid(experts())
    (cell,) = grid.cells["model.layers.0"].values()
    assert cell.planned == pytest.approx(2 / 3) and (cell.low, cell.high, cell.layers) == (0.4, 0.8, 2)
    assert grid.measures == {"model.layers.0": (1.0, 2.0, 3.0)} and cell.measure == 2.0
    shown = make_picture(grid).panels[0].cells[0][0]
    assert shown[1:3] == ("67", "40–80") and "2 layers from 40.00 to 80.00 %" in shown[3]
    assert make_picture(make_grid(experts(0.59, 0.61))).panels[0].cells[0][0][2] == ""


def test_reached_is_shown_and_its_distance_from_the_plan_said_or_seen():
    made = llama(8)
    close = make_picture(make_grid(made, report(made)))
    assert [panel.title for panel in close.panels] == ["sparsity reached", "measure"]
    assert "every layer is as planned" in close.notes
    odd = "model.layers.3.mlp.up_proj"
    far = make_picture(make_grid(made, report(made, {odd})))
    assert far.panels[1].title == "reached minus planned"
    assert far.panels[1].cells[3][2][0] == pytest.approx(-0.253) and far.panels[1].cells[3][1][0] == 0
    assert any(odd in note and "25.3 %" in note and "50.6 %" in note for note in far.notes)
    assert make_picture(make_grid(made)).panels[0].title == "sparsity planned"


def test_two_models_and_their_difference():
    one, other = llama(3), llama(3, "farms", lambda block: 0.6)
    picture = make_picture(make_grid(one, name="one"), make_grid(other, report(other), "other"))
    titles = [panel.title for panel in picture.panels]
    assert titles[:3] == ["one\nplanned", "other\nreached", "second minus first"]
    assert titles[3:] == ["one\nmeasure", "other\nmeasure"]
    assert [round(row[0][0], 6) for row in picture.panels[2].cells] == [0.1, 0.098, 0.096]
    assert "+10.00 points, from 50.00 to 60.00 %" in picture.panels[2].cells[0][0][3]
    assert {(panel.low, panel.high) for panel in picture.panels[:2]} == {(0.5, 0.6)}, "one scale for both"
    with pytest.raises(ValueError, match=r"different models: 4 layers .* model.layers.3.self_attn.q_proj the first"):
        make_picture(make_grid(one), make_grid(llama(4)))
    with pytest.raises(ValueError, match=r"different models: 1 layers .*1000 weights and 7 weights"):
        make_picture(make_grid(plan({"h.0.a": 0.5})), make_grid(plan({"h.0.a": LayerPlan(0.5, 7)})))


def test_a_report_of_another_model_is_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        make_grid(llama(3), report(llama(2)))


def test_a_picture_that_nobody_could_read_is_refused():
    with pytest.raises(ValueError, match="at most 1000 and 100"):
        make_grid(plan({f"h.{i}.a": 0.5 for i in range(1001)}))
    with pytest.raises(ValueError, match="at most 1000 and 100"):
        make_grid(plan({f"h.0.a{i}": 0.5 for i in range(101)}))


def test_blocks_of_two_kinds_keep_their_order_and_leave_holes():
    linear, full = ("linear.in_proj", "linear.out_proj"), ("attn.q", "attn.o")
    names = [f"h.{b}.{p}" for b in range(4) for p in ((*full, "mlp.up") if b == 3 else (*linear, "mlp.up"))]
    picture = make_picture(make_grid(plan(dict.fromkeys(names, 0.5))))
    assert picture.projections == ["q", "o", "in_proj", "out_proj", "up"]
    assert [cell is None for cell in picture.panels[0].cells[3]] == [False, False, True, True, False]
    assert "hatched: the block has no such layer" in picture.notes
    assert heatmaps.draw_for_page(picture).body.count("url(#h") == 1, "hatching shows through where no cell is"


@pytest.mark.parametrize(
    ("allocator", "name"),
    [
        ("owl", "outlier ratio"),
        ("alphapruning", "tail exponent"),
        ("farms", "tail exponent"),
        ("mrp", "redundancy"),
        ("msp", "Fisher"),
        ("own_idea", "measure of own_idea"),
    ],
)
def test_the_measure_has_its_name(allocator, name):
    panel = make_picture(make_grid(llama(3, allocator))).panels[-1]
    assert isinstance(panel, Dots) and name in panel.caption and not panel.log


def test_measures_that_say_nothing_are_not_drawn():
    for measure in (0.0, None, 1e308):
        made = plan({"h.0.a": LayerPlan(0.5, 10, measure=measure), "h.1.a": LayerPlan(0.6, 10, measure=measure)})
        assert len(make_picture(make_grid(made)).panels) == 1


def test_measures_over_many_powers_of_ten_are_logarithmic():
    made = plan({f"h.{b}.a": LayerPlan(0.5, 10, measure=10.0**b) for b in range(6)})
    panel = make_picture(make_grid(made)).panels[-1]
    assert panel.log and panel.ticks[0] == 1 and panel.ticks[-1] <= 1e5
    assert panel.low < 1 and panel.high > 1e5


def test_a_scale_does_not_shout_about_nothing():
    assert bounds([0.6]) == (0.55, 0.65) and bounds([0.0]) == (0, 0.05) and bounds([0.595, 0.605]) == (0.55, 0.65)
    assert bounds([0.413, 0.772]) == (0.41, 0.78)


def test_blocks_are_in_order_of_depth_though_a_config_sorts_its_names():
    made = llama(12)
    folder = Plan(made.config, dict(sorted(made.layers.items())))
    blocks = [f"model.layers.{b}" for b in range(12)]
    assert list(make_grid(folder).cells) == blocks
    assert (
        list(
            by_block_and_projection({n: x.sparsity for n, x in folder.layers.items()}, dict.fromkeys(folder.layers, 1))
        )
        == blocks
    )
    with_report = make_grid(folder, report(made))
    assert list(with_report.cells) == blocks and with_report.projections == make_grid(made).projections


# ---- what stands beside it


@pytest.mark.parametrize(("blocks", "rows"), [(8, list(range(8))), (80, [*range(0, 80, 5), 79])])
def test_ticks(blocks, rows):
    picture = make_picture(make_grid(llama(blocks)))
    assert picture.ticks == [(row, str(row)) for row in rows]
    assert picture.numbered is (blocks == 8)


def test_encoder_and_decoder_are_told_apart():
    names = [f"model.{s}.layers.{b}.fc1" for s in ("encoder", "decoder") for b in range(3)]
    picture = make_picture(make_grid(plan(dict.fromkeys(names, 0.5))))
    assert [label for _, label in picture.ticks] == ["encoder 0", "1", "2", "decoder 0", "1", "2"]
    assert picture.breaks == [3]


def test_a_local_path_is_not_published():
    assert make_grid(plan({"h.0.a": 0.5}, name="/home/me/models/gpt2/")).name == "gpt2"
    assert make_grid(plan({"h.0.a": 0.5}, name="meta-llama/Llama-3.1-8B")).name == "meta-llama/Llama-3.1-8B"


def test_the_embedded_model_has_its_name_wherever_the_package_lies():
    here = str(Path(demo.__file__).parent / "model")
    for path in (here, "/elsewhere/site-packages/hf_sparsity/demo/model", "/elsewhere/hf_sparsity/demo", "demo"):
        assert make_grid(plan({"h.0.a": 0.5}, name=path)).name == "demo"
    assert make_grid(plan({"h.0.a": 0.5}, name="/data/model")).name == "model"


# ---- files


def test_long_names_lose_their_middle():
    assert panels.clean("model.layers.3") == "model.layers.3"
    assert panels.clean("a" * 50 + "z" * 50) == "a" * 16 + "…" + "z" * 15
