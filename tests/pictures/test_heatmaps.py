"""Pictures of plans as PNG and HTML: the same bytes again, at any size, and nothing that breaks out."""

from __future__ import annotations

import re
import sys

import pytest

from hf_sparsity.pictures import canvas, colours, heatmaps, pages
from hf_sparsity.pictures.files import check_page, check_picture
from hf_sparsity.pictures.grid import make_grid
from hf_sparsity.pictures.panels import make_picture
from hf_sparsity.plan import LayerPlan
from tests.pictures.pages import Page, check_harmless
from tests.pictures.plans import llama, plan, report


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
