"""Figures of a report: curves as inline SVG, pictures as PNG bytes. matplotlib's global state stays as it was."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from mnclglf.reports.series import Metrics, Series, thin

DOTS_PER_INCH = 160
SMOOTH_ABOVE = 100  # number of points above which a running mean is drawn over them
LOGARITHMIC_ABOVE = 20.0  # ratio of the highest to the lowest value
PATCH_GAP = 0.12  # gap between patches as a fraction of a patch's side


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colors of a figure. The lines use Okabe and Ito's palette, which color-blind readers can tell apart."""

    background: str
    text: str
    muted: str
    grid: str
    lines: tuple[str, str, str]


LIGHT = Theme(
    background="#ffffff", text="#1f2328", muted="#656d76", grid="#e4e7eb", lines=("#0072b2", "#d55e00", "#009e73")
)
DARK = Theme(
    background="#161b22", text="#e6edf3", muted="#9198a1", grid="#2b323b", lines=("#56b4e9", "#e69f00", "#2fc79a")
)


# Drawn with these, and then replaced by the page's colors, so that one drawing serves the light and the dark page.
MARKED = Theme(
    background="#fe0001", text="#fe0002", muted="#fe0003", grid="#fe0004", lines=("#fe0005", "#fe0006", "#fe0007")
)
VARIABLES = ("--card", "--text", "--muted", "--line", "--first", "--second", "--third")


class Drawing(NamedTuple):
    """One panel as an inline SVG, which takes its colors from the page."""

    title: str
    svg: str


class Curve(NamedTuple):
    """Line of a panel: the key of the records it shows, and its name."""

    key: str
    label: str


class Level(NamedTuple):
    """Horizontal reference line."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Pair of axes over training steps."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: Level | None = None
    percent: bool = False
    """Shows fractions as percentages from 0 to 100."""
    smooth: bool = True
    """Draws a running mean over many points; off for curves without noise."""
    from_zero: bool = False
    logarithmic: bool = False
    """Uses a logarithmic axis if the values span more than LOGARITHMIC_ABOVE; else a linear one from zero."""


class Dots(NamedTuple):
    """Series of a dot chart, with any number of values per row."""

    label: str
    rows: Sequence[Sequence[float]]
    color: int
    """Index into a theme's lines."""
    absent: str = ""
    """Text in a row without values."""


class DotPanel(NamedTuple):
    """Pair of axes of a dot chart."""

    title: str
    series: Sequence[Dots]


def loss_curves(metrics: Metrics, *, uninformed: float | None = None) -> list[Drawing]:
    """Draws the loss and its terms (loss_...) over the steps.

    Args:
        metrics: figures of metrics.jsonl.
        uninformed: value of each term while all candidates look alike, ln N; drawn as a dashed line.
    """
    terms = sorted(key for key in metrics.series if key.startswith("loss_"))
    level = None if uninformed is None else Level(uninformed, f"no information: {uninformed:.2f}")
    panels = [Panel(title="Loss", unit="loss", curves=(Curve("loss", "loss"),))]
    for first in range(0, len(terms), 3):  # as many curves as a panel has colors
        curves = tuple(Curve(term, term) for term in terms[first : first + 3])
        panels.append(Panel(title="Its terms", unit="loss", curves=curves, level=level))
    return [_panel(metrics, panel) for panel in panels]


def schedule_curves(metrics: Metrics) -> list[Drawing]:
    """Draws learning rate and throughput over the steps, and the EMA momentum if it changes."""
    panels = [
        Panel(title="Learning rate", unit="learning rate", curves=(Curve("lr", "lr"),), smooth=False, from_zero=True),
        Panel(title="Throughput", unit="images / s", curves=(Curve("images_per_second", "speed"),), from_zero=True),
    ]
    if len(np.unique(metrics.of("ema_momentum").values)) > 1:
        panels.insert(1, Panel(title="EMA momentum", unit="m", curves=(Curve("ema_momentum", "m"),), smooth=False))
    return [_panel(metrics, panel) for panel in panels]


def health_curves(metrics: Metrics, *, ideal_std: float | None = 1.0) -> list[Drawing]:
    """Draws the signs of collapse: feature spread, effective rank, neighbor agreement, queue fill, gradient norm.

    Also the k-NN accuracy, where --knn-every was given.

    Args:
        metrics: figures of metrics.jsonl; those that are missing are not drawn.
        ideal_std: feature_std of evenly spread directions, drawn as a dashed line; None draws no line.
    """
    level = None if ideal_std is None else Level(ideal_std, "spread evenly")
    panels = [
        Panel(
            title="Feature spread",
            unit="std x sqrt(F)",
            curves=(Curve("feature_std", "spread"),),
            level=level,
            from_zero=True,
        ),
        Panel(title="Effective rank", unit="dimensions", curves=(Curve("effective_rank", "rank"),), from_zero=True),
        Panel(title="Gradient norm", unit="L2 norm", curves=(Curve("gradient_norm", "norm"),), logarithmic=True),
        Panel(
            title="Neighbors of the same class", unit="%", curves=(Curve("neighbor_agreement", "share"),), percent=True
        ),
        Panel(title="Queue fill", unit="%", curves=(Curve("queue_fill", "fill"),), smooth=False, percent=True),
    ]
    knn = Panel(title="k-NN accuracy", unit="%", curves=(Curve("knn_top1", "top-1"),), smooth=False, percent=True)
    return [_panel(metrics, panel) for panel in [*panels, knn] if len(metrics.of(panel.curves[0].key).steps)]


def views_picture(
    images: NDArray[np.uint8],
    views: NDArray[np.float32],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    *,
    divided_views: Sequence[int] | None = None,
    theme: Theme = LIGHT,
) -> bytes:
    """Draws one row per image: the image, its views, and the 2 x 2 patches of some views.

    Args:
        images: images, uint8 [n, H, W, 3].
        views: views [V, n, 3, S, S], normalized with mean and std.
        mean: channel means [3] of images in [0, 1].
        std: channel deviations [3] of images in [0, 1].
        divided_views: numbers of the views, from 1, whose patches are drawn; None is the first and the last.
        theme: colors.
    """
    pixels = np.moveaxis(views, 2, -1) * std + mean  # [V, n, S, S, 3]
    pixels = np.nan_to_num(pixels).clip(0, 1)
    count = len(pixels)
    numbers = sorted({1, count}) if divided_views is None else [view for view in divided_views if view <= count]
    columns = ["image", *(f"view {v + 1}" for v in range(count)), *(f"patches of\nview {v}" for v in numbers)]
    pictures = [list(images), *map(list, pixels), *([divided(image) for image in pixels[v - 1]] for v in numbers)]
    return picture_grid(columns, pictures, theme=theme)


def picture_grid(
    titles: Sequence[str],
    columns: Sequence[Sequence[NDArray[Any]]],
    *,
    heading: str = "",
    theme: Theme = LIGHT,
) -> bytes:
    """Draws columns of pictures under their titles; small pictures show their pixels.

    Args:
        titles: titles of the columns.
        columns: columns of pictures [H, W, 3], uint8 or floats in [0, 1].
        heading: heading of the figure.
        theme: colors.
    """
    rows, cell = max(len(column) for column in columns), 1.3  # inches
    above = 0.5 + (0.3 if heading else 0)
    height = cell * rows + above
    figure = Figure(figsize=(cell * len(columns), height), facecolor=theme.background)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - above / height, wspace=0.08, hspace=0.08)
    if heading:
        figure.suptitle(heading, color=theme.text, fontsize=10, y=1 - 0.06 / height, va="top")
    for axis in grid.ravel():
        axis.set_axis_off()
    for column, (title, group) in enumerate(zip(titles, columns, strict=True)):
        grid[0, column].set_title(title, color=theme.text, fontsize=9)
        for row, picture in enumerate(group):
            grid[row, column].imshow(picture, interpolation="nearest" if picture.shape[0] < 128 else "antialiased")
    return _png(figure)


def divided(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns [S, S, 3] in [0, 1] as RGBA: its 2 x 2 patches with gaps between them, on a transparent background."""
    half = image.shape[0] // 2
    gap = max(1, round(PATCH_GAP * half))
    canvas = np.zeros((2 * half + gap, 2 * half + gap, 4), np.float32)
    for row in (0, 1):
        for column in (0, 1):
            patch = image[row * half : (row + 1) * half, column * half : (column + 1) * half]
            top, left = row * (half + gap), column * (half + gap)
            canvas[top : top + half, left : left + half, :3] = patch
            canvas[top : top + half, left : left + half, 3] = 1
    return canvas


def dot_chart(
    labels: Sequence[str], panels: Sequence[DotPanel], *, heading: str = "", unit: str = "%", theme: Theme = LIGHT
) -> bytes:
    """Draws rows of values: one dot per value, their mean, and a line over mean +- standard deviation (n - 1).

    Args:
        labels: labels of the rows, from the top.
        panels: panels, side by side; each series has one row per label.
        heading: heading of the figure.
        unit: unit of the values.
        theme: colors.
    """
    size = (2.4 + 3.3 * len(panels), 1.3 + 0.3 * len(labels))  # inches
    figure = Figure(figsize=size, facecolor=theme.background, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    figure.suptitle(heading, color=theme.text, fontsize=11)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    for axis, panel in zip(axes, panels, strict=True):
        for dots in panel.series:
            _draw_dots(axis, dots, theme)
        _dress_dots(axis, panel, unit, theme)
    return _png(figure)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Returns the mean of the values at most window // 2 away from each; shorter at the ends."""
    half, n = window // 2, len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stops, starts = np.minimum(np.arange(n) + half + 1, n), np.maximum(np.arange(n) - half, 0)
    return (sums[stops] - sums[starts]) / (stops - starts)


def _panel(metrics: Metrics, panel: Panel) -> Drawing:
    figure = Figure(figsize=(3.6, 2.7), layout="constrained")
    figure.patch.set_alpha(0)
    _draw(figure.subplots(), metrics, panel, MARKED)
    return Drawing(panel.title, inline_svg(figure, panel.title))


def inline_svg(figure: Figure, title: str) -> str:
    """Returns a figure that was drawn with MARKED as an <svg> element for a page, as wide as its place.

    Args:
        figure: the figure.
        title: what it shows; ids begin with it, so that several can stand on one page.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mnclglf"}):  # text as text; the same ids every time
        _save(figure, buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # a style would be the whole page's
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    first = f'<svg role="img" aria-label="{title} over the steps" {box[0]}>'
    svg = first + svg[svg.index(">") + 1 :]
    own = re.sub(r"\W", "-", title)
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = svg.replace("url(#", f"url(#{own}-").replace('xlink:href="#', f'href="#{own}-')
    for color, variable in zip((*astuple(MARKED)[:4], *MARKED.lines), VARIABLES, strict=True):
        svg = svg.replace(color, f"var({variable})")
    return svg


def _draw(axis: Axes, metrics: Metrics, panel: Panel, theme: Theme) -> None:
    scale = 100 if panel.percent else 1
    drawn = 0
    for curve, color in zip(panel.curves, theme.lines, strict=False):
        steps, values = metrics.of(curve.key)
        if len(steps):
            drawn += 1
            _draw_curve(axis, Series(steps, scale * values), curve.label, color, panel.smooth)
    if drawn and panel.level is not None:
        axis.axhline(panel.level.value, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)), label=panel.level.label)
    if not drawn:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color=theme.muted)
    _dress(axis, panel, theme)
    if drawn > 1 or (drawn and panel.level is not None):
        axis.legend(frameon=False, fontsize=8, labelcolor=theme.text, handlelength=1.8)


def _draw_curve(axis: Axes, series: Series, label: str, color: str, smooth: bool) -> None:
    steps, values = series
    if not smooth or len(steps) <= SMOOTH_ABOVE:
        marker = "o" if len(steps) < 3 else None
        axis.plot(*thin(series), color=color, linewidth=1.6, marker=marker, markersize=4, label=label)
        return
    axis.plot(*thin(series), color=color, linewidth=0.7, alpha=0.3)
    mean = running_mean(values, window=max(5, len(values) // 20))  # of all points, before it is thinned
    axis.plot(*thin(Series(steps, mean)), color=color, linewidth=1.8, label=label)


def _draw_dots(axis: Axes, dots: Dots, theme: Theme) -> None:
    color, label = theme.lines[dots.color], dots.label
    for row, values in enumerate(dots.rows):
        if not values:
            place = axis.get_yaxis_transform()  # x as a fraction of the axes
            axis.text(0.02, row, dots.absent, transform=place, va="center", fontsize=8, color=theme.muted)
            continue
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axis.plot([mean - spread, mean + spread], [row, row], color=color, linewidth=1.6, alpha=0.4)
        axis.plot(values, [row] * len(values), color=color, linestyle="", marker=".", markersize=5)
        axis.plot([mean], [row], color=color, marker="oD^"[dots.color], markersize=6, linestyle="", label=label)
        label = None  # only once in the legend


def _dress_dots(axis: Axes, panel: DotPanel, unit: str, theme: Theme) -> None:
    axis.set_title(panel.title, loc="left", fontsize=10, color=theme.text)
    axis.set_xlabel(unit, fontsize=9, color=theme.muted)
    axis.set_facecolor(theme.background)
    axis.tick_params(colors=theme.muted, labelsize=8, length=0)
    axis.tick_params(axis="y", colors=theme.text)
    axis.grid(color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.1)
    for spine in axis.spines.values():
        spine.set_color(theme.grid)
    handles, _ = axis.get_legend_handles_labels()
    if not handles:
        axis.set_xlim(0, 100)
    if len(handles) > 1:
        axis.legend(frameon=False, fontsize=8, labelcolor=theme.text)


def dress_steps(axis: Axes, title: str, unit: str, theme: Theme) -> None:
    """Gives axes over training steps their title, labels, grid and colors."""
    axis.set_title(title, loc="left", fontsize=10, color=theme.text)
    axis.set_xlabel("step", fontsize=9, color=theme.muted)
    axis.set_ylabel(unit, fontsize=9, color=theme.muted)
    axis.set_facecolor(theme.background)
    axis.tick_params(colors=theme.muted, labelsize=8, length=0)
    axis.grid(color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.margins(x=0.02)


def _dress(axis: Axes, panel: Panel, theme: Theme) -> None:
    dress_steps(axis, panel.title, panel.unit, theme)
    lowest, highest = axis.dataLim.intervaly
    if panel.logarithmic and 0 < lowest * LOGARITHMIC_ABOVE < highest < math.inf:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 1e3 * lowest else (1,)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    elif panel.percent:
        axis.set_ylim(0, 103)
    elif panel.from_zero or panel.logarithmic:
        axis.set_ylim(bottom=0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    _save(figure, buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": "mnclglf"})
    return buffer.getvalue()


def _save(figure: Figure, buffer: io.StringIO | io.BytesIO, **settings: Any) -> None:
    """Writes a figure whose texts, such as names of classes and folders, are shown as they are."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may have $ in it  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        # matplotlib draws a box for a letter that its font lacks, as of Chinese, and warns for each.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(cast(Any, buffer), **settings)
