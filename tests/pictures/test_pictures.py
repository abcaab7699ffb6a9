"""Pictures of plans: the numbers behind them, what is shown, and that both formats can be read and trusted."""

from __future__ import annotations

import re
import sys
from itertools import pairwise

import pytest

from hf_sparsity.files import write_whole
from hf_sparsity.pictures import canvas, colours, heatmaps, pages, panels
from hf_sparsity.pictures.files import check_page, check_picture
from hf_sparsity.pictures.grid import by_block_and_projection, make_grid, places, split_name
from hf_sparsity.pictures.panels import Dots, bounds, make_picture
from hf_sparsity.plan import LayerPlan, LayerReport, Plan, Report
from tests.pictures.pages import Page, check_harmless

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
GITHUB_DARK, WHITE = "#0d1117", "#ffffff"


def plan(layers, allocator="owl", **model):
    entries = {name: one if isinstance(one, LayerPlan) else LayerPlan(one, 1000) for name, one in layers.items()}
    config = {"sparsity": 0.6, "allocator": {"name": allocator}, "pruner": {"name": "wanda"}}
    return Plan(config, entries, {"name": "tiny", **model})


def llama(blocks, allocator="owl", sparsity=lambda block: 0.5 + 0.002 * block):
    return plan(
        {
            f"model.layers.{b}.{p}": LayerPlan(sparsity(b), 1000, measure=5.0 - b / blocks)
            for b in range(blocks)
            for p in PROJECTIONS
        },
        allocator,
    )


def report(made, less=()):
    """As planned, but for the layers in `less`, which lost half as many weights."""
    layers = {}
    for name, layer in made.layers.items():
        zeros = round(layer.sparsity * layer.size / (2 if name in less else 1))
        layers[name] = LayerReport(zeros, layer.size, layer.sparsity)
    return Report(made.target, layers)


def experts(low=0.4, high=0.8):
    """One block whose experts differ, the second twice the size of the first."""
    name = "model.layers.0.mlp.experts.up_proj"
    return plan({f"{name}[0]": LayerPlan(low, 100, measure=1.0), f"{name}[1]": LayerPlan(high, 200, measure=3.0)})


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


# ---- colours


def test_text_has_contrast_in_light_and_dark_pages():
    """WCAG AA: 4.5. The paper of a PNG is opaque, so what it is laid on does not matter."""
    assert min(colours.contrast(ink, colours.PAPER) for ink in (colours.INK, colours.QUIET)) >= 4.5
    for scale in (colours.SPARSITY, colours.DIFFERENCE):
        shades = [colours.shade(i / 200, 0, 1, scale) for i in range(201)]
        assert min(colours.contrast(colours.ink_on(shade), shade) for shade in shades) >= 4.5
    style = (pages.TEMPLATES / "style.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media")[:2])
    assert (light["paper"], dark["paper"]) == (WHITE, GITHUB_DARK) and set(colours.THEMED.values()) <= set(light)
    for theme in (light, dark):
        assert min(colours.contrast(theme[ink], theme["paper"]) for ink in ("ink", "quiet")) >= 4.5
        for paper in ("paper", "mark"):
            assert colours.contrast(theme["ink"], theme[paper]) >= 4.5
            assert min(colours.contrast(theme[ink], theme[paper]) for ink in ("accent", "worse", "quiet")) >= 3
    assert not set(colours.THEMED) & {*colours.SPARSITY, *colours.DIFFERENCE, *colours.AMOUNT}
    assert colours.contrast("#000000", WHITE) == pytest.approx(21)


def test_lightness_rises_evenly_so_that_grey_would_do():
    def lightness(shade):
        y = 1.05 / colours.contrast(shade, WHITE) - 0.05
        return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y

    steps = [lightness(colours.shade(i / 9, 0, 1, colours.SPARSITY)) for i in range(10)]
    rises = [b - a for a, b in pairwise(steps)]
    assert min(rises) > 5 and max(rises) < 2 * min(rises)
    halves = [lightness(shade) for shade in colours.DIFFERENCE]
    assert halves[:4] == sorted(halves[:4]) and halves[3:] == sorted(halves[3:], reverse=True)
    assert abs(halves[0] - halves[-1]) < 10, "less and more weigh the same"


# ---- PNG


def pixels(file):
    from matplotlib.image import imread

    return imread(file)


@pytest.mark.parametrize("blocks", [8, 80])
def test_png_at_real_sizes(tmp_path, blocks):
    made = llama(blocks)
    image = pixels(heatmaps.draw_card(made, report(made), tmp_path / "card.png"))
    height, width, channels = image.shape
    assert height / canvas.DPI <= 16 and 3 < width / canvas.DPI < 8
    paper = [round(255 * float(value)) for value in image[2, width - 2][:3]]
    assert "#" + "".join(f"{value:02x}" for value in paper) == colours.PAPER
    assert channels == 3 or image[..., 3].min() == 1, "see-through where a page is dark"


def test_png_is_the_same_bytes_again_and_carries_no_date(tmp_path):
    made = llama(3)
    one = heatmaps.draw_card(made, None, tmp_path / "one.png").read_bytes()
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 10, "axes.grid": True}):
        assert heatmaps.draw_card(made, None, tmp_path / "two.png").read_bytes() == one
    assert one[:4] == b"\x89PNG" and not re.search(rb"tEXt|iTXt|tIME", one)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "two.png"]


@pytest.mark.filterwarnings("error")
def test_png_of_hostile_names(tmp_path):
    """Not read as formulas, not taller or wider for a name of any length."""
    names = ["h.0.$\\frac$", "h.0.a$b_", "h.0." + "w" * 100_000, "h.0.\x00\n\x1b[31m", "h.0.名"]
    picture = make_picture(make_grid(plan(dict.fromkeys(names, 0.5), "$\\x$", name="$\\frac{$")))
    image = pixels(heatmaps.draw_png(picture, tmp_path / "x.png"))
    assert image.shape[0] < 1000 and image.shape[1] < 1000


def test_plans_side_by_side(tmp_path):
    file = heatmaps.draw_plans({f"plan {i}": llama(3) for i in range(5)}, tmp_path / "plans.png")
    assert pixels(file).shape[1] > pixels(heatmaps.draw_plans({"one": llama(3)}, tmp_path / "one.png")).shape[1]


def test_without_matplotlib_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: check_picture(tmp_path / "x.png"),
        lambda: check_picture(tmp_path / "x.html"),
        lambda: check_page(tmp_path / "x.html"),
        lambda: heatmaps.draw_card(llama(3), None, tmp_path / "x.png"),
        lambda: pages.draw_html(make_picture(make_grid(llama(3))), tmp_path / "x.html"),
    ):
        with pytest.raises(ValueError, match=r"a picture needs matplotlib: pip install 'hf_sparsity\[plot\]'"):
            draw()
    assert list(tmp_path.iterdir()) == []


# ---- HTML


def test_html_is_one_page_that_loads_and_runs_nothing(tmp_path):
    made = llama(8)
    file = pages.draw_html(make_picture(make_grid(made, report(made))), tmp_path / "x.html")
    text = file.read_text("utf-8")
    page = check_harmless(text)
    assert page.tags.count("svg") == 1 and text.count('class="cells"') == 2 and "prefers-color-scheme: dark" in text
    assert {"q_proj", "sparsity reached", "51"} <= set(page.words), "text in a drawing is text"
    assert "model.layers.7 up_proj: reached 51.40 %, planned 51.40 %, measure 4.125" in page.words
    assert any("outlier ratio (% of weights) 4.125" in word for word in page.words)
    assert pages.page(make_picture(make_grid(made, report(made)))) == text


def test_the_ink_of_a_page_is_the_readers(tmp_path):
    text = pages.page(
        make_picture(
            make_grid(plan({"h.0.a": LayerPlan(0.5, 9, measure=1.0), "h.1.b": LayerPlan(0.5, 9, measure=2.0)}))
        )
    )
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert not [colour for colour in colours.THEMED if colour in drawing] and colours.PAPER not in drawing
    assert {"var(--ink)", "var(--accent)", "var(--empty)", "var(--hatch)"} <= set(re.findall(r"var\(--\w+\)", drawing))


def test_drawings_on_one_page_do_not_share_names():
    """Or the second would be cut off by the frame of the first."""
    made = llama(3)
    one, two = (heatmaps.draw_for_page(make_picture(make_grid(made, name=name))) for name in ("one", "two"))
    names = [set(re.findall(r' id="([^"]+)"', drawing.body)) for drawing in (one, two)]
    assert all(names) and not names[0] & names[1]


def test_html_of_hostile_names(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    made = plan(
        {f"h.0.{evil}": LayerPlan(0.5, 10, measure=1.0), f"{evil}.1.b": LayerPlan(0.6, 10, measure=2.0)},
        evil,
        name=evil,
    )
    far = report(made, set(made.layers))
    text = pages.page(make_picture(make_grid(made, far, evil), make_grid(made, None, evil)))
    check_harmless(text)
    assert "&lt;script&gt;" in text
    file = pages.draw_html(make_picture(make_grid(plan({"h.0.\ud800": 0.5}))), tmp_path / "x.html")
    Page(file.read_text("utf-8"))


# ---- files


def test_where_a_picture_can_go(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png or \.html"):
        check_picture(tmp_path / "x.svg")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_picture(tmp_path / "nowhere" / "x.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_picture(tmp_path / "folder.png")
    assert check_picture(tmp_path / "X.PNG").name == "X.PNG"


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_whole(tmp_path / "x.png", b"old")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_long_names_lose_their_middle():
    assert panels.clean("model.layers.3") == "model.layers.3"
    assert panels.clean("a" * 50 + "z" * 50) == "a" * 16 + "…" + "z" * 15
