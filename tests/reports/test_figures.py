"""Tests of the figures: valid SVG and PNG for any records, the right values drawn, no global state changed."""

import io
import math
import re
from xml.etree import ElementTree

import hypothesis.strategies as st
import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from made_metrics import metrics_of
from matplotlib import mathtext
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from mnclglf.reports import figures
from mnclglf.reports.figures import (
    MARKED,
    VARIABLES,
    DotPanel,
    Dots,
    Drawing,
    divided,
    dot_chart,
    health_curves,
    loss_curves,
    picture_grid,
    running_mean,
    schedule_curves,
    views_picture,
)

CURVES = [loss_curves, schedule_curves, health_curves]
VALUES = st.none() | st.floats() | st.integers(-(10**9), 10**9) | st.text(max_size=3) | st.booleans()


def pixels(png: bytes) -> np.ndarray:
    """Returns the pixels [H, W, 4] in [0, 1]."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return imread(io.BytesIO(png))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the figures made from here on, before they become PNG or SVG."""
    made: list[Figure] = []
    monkeypatch.setattr(figures, "_png", lambda figure: made.append(figure) or b"")
    monkeypatch.setattr(figures, "inline_svg", lambda figure, title: made.append(figure) or "")
    return made


def axes_of(drawn: list[Figure]) -> list[Axes]:
    """Returns the axes of figures that have one each."""
    return [axis for figure in drawn for axis in figure.axes]


def check_svgs(drawings: list[Drawing]) -> None:
    """Asserts that drawings are elements that can stand on one page."""
    ids: list[str | None] = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing.svg)
        assert root.tag == "svg"  # without a namespace, which HTML does not need
        assert root.get("aria-label") == f"{drawing.title} over the steps"
        own = [element.get("id") for element in root.iter() if element.get("id")]
        used = re.findall(r"url\(#([^)]*)\)", drawing.svg) + re.findall(r'href="#([^"]*)"', drawing.svg)
        assert set(used) <= set(own)
        ids += own
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("draw", CURVES)
def test_curves_take_their_colors_from_the_page(draw, metrics):
    drawings = draw(metrics_of(metrics(468)))
    check_svgs(drawings)
    svg = "".join(drawing.svg for drawing in drawings)
    assert set(re.findall(r"var\((--[a-z]+)\)", svg)) >= {*VARIABLES[:5]}
    assert not re.search(r"#[0-9a-f]{6}\b|https?:|<style|<metadata", svg.replace("#000000", ""))
    assert MARKED.text not in svg


@pytest.mark.parametrize("draw", CURVES)
@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 3, "loss": 2.0, "lr": None}]])
def test_missing_values_are_no_error(draw, records):
    check_svgs(draw(metrics_of(records)))


@pytest.mark.parametrize("values", [(0, 0), (-5, 5), (3e38, -3e38), (1e-45, 1e38), (7.5, 7.5), (1e9, 1e9 + 1)])
@pytest.mark.parametrize("steps", [(0, 1), (5, 5), (1, 2**53 - 1)])
def test_extreme_values_are_no_error(values, steps):
    keys = ("loss", "loss_s", "gradient_norm", "feature_std", "queue_fill")
    records = [{"step": step, **dict.fromkeys(keys, value)} for step, value in zip(steps, values, strict=True)]
    check_svgs(loss_curves(metrics_of(records), uninformed=4.85))
    check_svgs(health_curves(metrics_of(records)))


def test_loss_panels_hold_the_loss_the_terms_and_the_level(drawn):
    records = [{"step": 10 * i, "loss": 7.0 * i, "loss_s": 1.0 * i, "loss_m": 1.0 * i} for i in range(1, 5)]
    loss_curves(metrics_of(records), uninformed=math.log(256))
    total, terms = axes_of(drawn)
    assert np.asarray(total.get_lines()[0].get_xydata()).tolist() == [[10 * i, 7 * i] for i in range(1, 5)]
    assert [line.get_label() for line in terms.get_lines()] == ["loss_m", "loss_s", "no information: 5.55"]
    assert terms.get_lines()[2].get_ydata() == pytest.approx([math.log(256)] * 2)
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() == "loss" for axis in axes_of(drawn))


def test_every_term_is_drawn(drawn):
    names = ["loss_a", "loss_b", "loss_c", "loss_d"]
    loss_curves(metrics_of([{"step": step, "loss": 4.0, **dict.fromkeys(names, 1.0)} for step in (1, 2)]))
    shown = axes_of(drawn)
    assert [line.get_label() for axis in shown[1:] for line in axis.get_lines()] == names


def test_health_panels_are_those_that_were_logged(drawn):
    health_curves(metrics_of([{"step": 1, "feature_std": 0.5, "queue_fill": 0.25}, {"step": 2, "feature_std": 0.6}]))
    shown = axes_of(drawn)
    assert [axis.get_title("left") for axis in shown] == ["Feature spread", "Queue fill"]
    assert shown[0].get_lines()[1].get_ydata() == pytest.approx([1.0, 1.0])
    assert shown[1].get_lines()[0].get_ydata() == pytest.approx([25.0])


def test_gradient_norms_of_many_sizes_get_a_logarithmic_axis(drawn):
    for top in (2.0, 500.0):
        health_curves(metrics_of([{"step": step, "gradient_norm": norm} for step, norm in ((1, 1.0), (2, top))]))
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["linear", "log"]


def test_a_single_step_is_one_tick(drawn):
    schedule_curves(metrics_of([{"step": 10, "lr": 0.1, "images_per_second": 5.0}]))
    for axis in axes_of(drawn):
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [10]


def test_ema_momentum_is_shown_where_it_changes(drawn):
    for momenta, count in (((0.99, 0.99), 2), ((0.99, 0.995), 3)):
        drawn.clear()
        schedule_curves(metrics_of([{"step": i, "lr": 0.1, "ema_momentum": m} for i, m in enumerate(momenta)]))
        assert len(drawn) == count


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 60))
def test_running_mean_is_the_mean_of_what_is_near(values, window):
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    smooth = running_mean(values, window)
    assert smooth == pytest.approx(expected, abs=1e-9)


def test_patches_are_the_quarters_with_a_gap():
    image = (np.arange(8 * 8 * 3).reshape(8, 8, 3) / 192).astype(np.float32)
    result = divided(image)
    gap = result.shape[0] - 8
    assert gap >= 1
    assert result.shape == (8 + gap, 8 + gap, 4)
    keep = [*range(4), *range(4 + gap, 8 + gap)]
    assert np.array_equal(result[np.ix_(keep, keep)][..., :3], image)
    assert (result[np.ix_(keep, keep)][..., 3] == 1).all()
    assert (result[4 : 4 + gap] == 0).all()
    assert (result[:, 4 : 4 + gap] == 0).all()


def test_views_are_shown_as_they_were_before_normalisation(drawn, made_views):
    arrays = made_views(n=2)
    views_picture(**arrays)
    axes = np.array(drawn[0].axes).reshape(2, 6)
    assert [axis.get_title() for axis in axes[0]] == [
        "image", "view 1", "view 2", "view 3", "patches of\nview 1", "patches of\nview 3"
    ]  # fmt: skip
    shown = np.asarray(axes[1, 0].get_images()[0].get_array())
    assert np.array_equal(shown, arrays["images"][1])
    for view in range(3):
        shown = np.asarray(axes[1, 1 + view].get_images()[0].get_array())
        restored = np.moveaxis(arrays["views"][view, 1], 0, -1) * arrays["std"] + arrays["mean"]
        assert shown == pytest.approx(restored.clip(0, 1), abs=1e-6)
    last = np.asarray(axes[1, 5].get_images()[0].get_array())
    assert np.array_equal(last, divided(np.asarray(axes[1, 3].get_images()[0].get_array())))


@pytest.mark.parametrize(
    ("divided_views", "titles"), [((), []), ((1, 2), ["patches of\nview 1", "patches of\nview 2"]), ((4,), [])]
)
def test_patches_are_drawn_of_the_views_that_are_cut(drawn, made_views, divided_views, titles):
    arrays = made_views(n=1)
    views_picture(**arrays, divided_views=divided_views)
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == ["image", "view 1", "view 2", "view 3", *titles]
    for axis, view in zip(axes[4:], divided_views, strict=False):
        whole = np.asarray(axes[view].get_images()[0].get_array())
        assert np.array_equal(np.asarray(axis.get_images()[0].get_array()), divided(whole))


@pytest.mark.parametrize(("n", "count"), [(1, 1), (3, 2)])
def test_any_number_of_views_is_a_picture(n, count, made_views):
    arrays = made_views(n=n)
    arrays["views"] = arrays["views"][:count]
    arrays["views"][0, 0, 0, 0, 0] = math.nan
    assert pixels(views_picture(**arrays)).shape[0] > 200


def test_matplotlibs_state_stays_as_it_was(metrics):
    before = dict(mpl.rcParams)
    loss_curves(metrics_of(metrics(20)))
    assert dict(mpl.rcParams) == before


def test_the_same_records_give_the_same_bytes(metrics):
    assert loss_curves(metrics_of(metrics(20))) == loss_curves(metrics_of(metrics(20)))


def test_dots_show_means_deviations_and_absent_rows(drawn: list[Figure]) -> None:
    ours = Dots("ours", [[70.0, 74.0], [], [60.0]], color=0, absent="not run")
    paper = Dots("paper", [[80.0], [81.0], []], color=1)
    dot_chart(["a", "b", "c"], [DotPanel("both", [ours, paper]), DotPanel("none", [Dots("ours", [[], [], []], 0)])])
    both, none = drawn[0].axes
    means = [tuple(np.asarray(line.get_xydata())[0]) for line in both.lines if line.get_marker() in ("o", "D")]
    assert means == [(72.0, 0), (60.0, 2), (80.0, 0), (81.0, 1)]
    spans = [tuple(np.asarray(line.get_xdata())) for line in both.lines if line.get_linestyle() == "-"]
    assert spans[0] == pytest.approx((72 - 8**0.5, 72 + 8**0.5))  # deviations from 72 are 2 and 2, over n - 1 = 1
    assert [(text.get_text(), text.get_position()[1]) for text in both.texts if text.get_text()] == [("not run", 1)]
    legend = both.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "paper"]
    assert [tick.get_text() for tick in both.get_yticklabels()] == ["a", "b", "c"]
    assert none.get_legend() is None
    assert not none.lines


def test_a_users_names_are_not_parsed_as_maths(monkeypatch):
    """$x_$ is no maths, and raised; a$b$c was drawn with an italic b."""
    parsed: list[str] = []
    parse = mathtext.MathTextParser.parse
    monkeypatch.setattr(
        mathtext.MathTextParser,
        "parse",
        lambda self, s, *args, **more: parsed.append(s) or parse(self, s, *args, **more),
    )
    column = [np.zeros((4, 4, 3))]
    pixels(picture_grid(["$x_$", "a$b$c"], [column, column], heading="folder:$y_$"))
    pixels(
        dot_chart(["$x_$", "a$b$c"], [DotPanel("$z_$", [Dots("$l_$", [[1.0], [2.0]], 0), Dots("$m$", [[], [3.0]], 1)])])
    )
    assert parsed == []


def test_letters_that_the_font_lacks_are_drawn_without_a_warning() -> None:
    pixels(picture_grid(["木", "café"], [[np.zeros((4, 4, 3))]] * 2, heading="folder:木"))  # a warning is an error here
