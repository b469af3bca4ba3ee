"""`python -m bench.draw bench/results/NAME.json`: draws saved benchmarks.

It writes pictures and a Markdown file beside the JSON of pytest-benchmark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.measurement import HEADINGS, STEP_HEADINGS, OperatorMeasurement, StepMeasurement
from mnclglf.reports.figures import DOTS_PER_INCH, LIGHT

ROOT = Path(__file__).resolve().parents[1]
M = TypeVar("M", OperatorMeasurement, StepMeasurement)
# One hue per backend, from Okabe and Ito's palette; bf16 is the darker one.
COLORS = {
    "reference bf16": "#8c959f",
    "torch fp32": "#7cc0ea",
    "torch bf16": "#0072b2",
    "triton fp32": "#f2b48a",
    "triton bf16": "#d55e00",
    "faiss fp32": "#009e73",
}
# Lengths in inches.
BAR = 0.15  # height of a bar
GAP = 0.17  # between cases
AROUND = 0.75  # above and below a panel's bars
HEAD = 0.95  # above the panels
COLUMN = 6.6  # width of a column
LABELS = 2.35  # width of its labels
MARGIN = 0.15
BARS = COLUMN - LABELS - 2 * MARGIN
TWO_COLUMNS_ABOVE = 40  # bars
STEP_TITLES = {
    "ablation": "Images per second, one optimization more per variant (x first variant): ",
    "peers": "TFLOP/s of ours and lightly's (x: ours over theirs): ",
}


class Saved(NamedTuple):
    """The contents of a JSON file."""

    operators: list[OperatorMeasurement]
    steps: list[StepMeasurement]
    source: str  # one line: machine, versions, commit, date
    device: str


def read(path: Path) -> Saved:
    """Reads saved measurements.

    Raises:
        SystemExit: the file is not one that make bench wrote.
    """
    try:
        saved = json.loads(path.read_text())
        found = saved["benchmarks"]
        operators = [
            OperatorMeasurement.from_json(benchmark) for benchmark in found if "operator" in benchmark["extra_info"]
        ]
        steps = [StepMeasurement.from_json(benchmark) for benchmark in found if "kind" in benchmark["extra_info"]]
        return Saved(operators, steps, provenance(saved), saved["machine_info"]["device"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} holds no results of make bench ({type(error).__name__}: {error})") from error


def provenance(saved: dict[str, Any]) -> str:
    """Describes machine, versions, commit and date in one line."""
    machine, commit = saved["machine_info"], saved["commit_info"]
    measured = {"torch", "cuda"} | {benchmark["extra_info"].get("backend") for benchmark in saved["benchmarks"]}
    if any(benchmark["extra_info"].get("kind") == "peers" for benchmark in saved["benchmarks"]):
        measured.add("lightly")
    versions = machine["versions"].items()
    versions = ", ".join(f"{name} {version}" for name, version in versions if name.split("-")[0] in measured)
    changed = " with uncommitted changes" if commit["dirty"] else ""
    return (
        f"{machine['device']}, {machine['threads']} threads; {versions}; "
        f"commit {commit['id'][:10]}{changed}; {saved['datetime'][:10]}"
    )


def grouped(rows: Sequence[M], key: str) -> dict[str, list[M]]:
    """Groups measurements by an attribute, in the order of first appearance."""
    groups: dict[str, list[M]] = {}
    for row in rows:
        groups.setdefault(getattr(row, key), []).append(row)
    return groups


def markdown(rows: Sequence[OperatorMeasurement], source: str) -> str:
    """Returns one table of all measurements of operators."""
    explained = (
        "x reference: times as fast as the plain form (Algorithm 1 as printed) in fp32 and, for bf16, under autocast "
        "to bf16; median (least to greatest) of the interleaved rounds."
    )
    lines = [
        f"{source}.",
        "",
        explained,
        "",
        f"| case | implementation | {' | '.join(HEADINGS)} |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for case, group in grouped(rows, "case").items():
        names = [case] + [""] * (len(group) - 1)
        lines += [
            f"| {' | '.join((name, row.implementation, *row.cells()))} |"
            for name, row in zip(names, group, strict=True)
        ]
    return "\n".join(lines) + "\n"


def step_markdown(rows: Sequence[StepMeasurement], source: str) -> str:
    """Returns one table per comparison."""
    explained = {
        "ablation": "Each variant has all optimizations before it. Ratio: times as fast as the first variant.",
        "peers": "Ratio: how many times as fast ours goes through its operations as the other through its own.",
    }
    lines = [f"{source}.", "", "Medians of the interleaved rounds (ratios: least to greatest)."]
    for case, group in grouped(rows, "case").items():
        lines += ["", f"{case}. {explained[group[0].kind]}", "", f"| step | {' | '.join(STEP_HEADINGS)} |"]
        lines += ["|---" + len(STEP_HEADINGS) * "|--:" + "|"]
        lines += [f"| {' | '.join((row.name, *row.cells()))} |" for row in group]
    return "\n".join(lines) + "\n"


def step_picture(rows: Sequence[StepMeasurement], source: str) -> Figure:
    """Draws horizontal bars, one panel per comparison: images per second, or TFLOP/s where methods differ in work."""
    groups = list(grouped(rows, "case").values())
    inches = [0.26 * len(group) + 0.75 for group in groups]
    width, height = 7.2, sum(inches) + 0.5
    figure = Figure(figsize=(width, height), facecolor=LIGHT.background)
    bottom = height - 0.5
    for group, tall in zip(groups, inches, strict=True):
        bottom -= tall
        axis = figure.add_axes((0.27, (bottom + 0.4) / height, 0.62, (tall - 0.7) / height))
        peers = group[0].kind == "peers"
        speeds = [row.tflop_per_second if peers else row.images_per_second for row in group]
        colors = [
            COLORS["torch bf16"] if row.name.startswith("+") or row.name.endswith("ours") else COLORS["reference bf16"]
            for row in group
        ]
        axis.barh(range(len(group)), speeds, height=0.7, color=colors, linewidth=0)
        for y, (row, speed) in enumerate(zip(group, speeds, strict=True)):
            ratio = "" if row.ratio is None else f"   {row.ratio.median:.2f}x"
            axis.annotate(
                f"{speed:,.2f}{ratio}" if peers else f"{speed:,.1f}{ratio}",
                (speed, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=7.5,
                color=LIGHT.muted,
            )
        axis.set(xlim=(0, 1.22 * max(speeds)), ylim=(len(group) - 0.5, -0.5))
        axis.set_yticks(range(len(group)), [row.name for row in group], fontsize=8)
        axis.tick_params(axis="x", colors=LIGHT.muted, labelsize=7.5, length=0)
        axis.tick_params(axis="y", colors=LIGHT.text, length=0)
        axis.set_title(STEP_TITLES[group[0].kind] + group[0].size, loc="left", fontsize=9, color=LIGHT.text, x=-0.42)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.text(0.02, 1 - 0.25 / height, "Training steps: longer is faster", fontsize=11.5, color=LIGHT.text)
    figure.text(0.02, 1 - 0.42 / height, source, fontsize=6.5, color=LIGHT.muted)
    return figure


def bars(rows: Sequence[OperatorMeasurement]) -> list[OperatorMeasurement]:
    """Returns the measurements that have a ratio to the reference."""
    return [row for row in rows if row.ratio is not None]


def panel_inches(rows: Sequence[OperatorMeasurement]) -> float:
    return BAR * len(bars(rows)) + GAP * len(grouped(bars(rows), "case")) + AROUND


def columns(panels: Sequence[list[OperatorMeasurement]]) -> list[list[list[OperatorMeasurement]]]:
    """Puts the panels in one column, or in two: from the tallest on, each into the shorter column."""
    if len(panels) == 1 or sum(len(bars(panel)) for panel in panels) <= TWO_COLUMNS_ABOVE:
        return [list(panels)]
    split: list[list[list[OperatorMeasurement]]] = [[], []]
    for panel in sorted(panels, key=panel_inches, reverse=True):
        min(split, key=lambda column: sum(map(panel_inches, column))).append(panel)
    return [[panel for panel in panels if panel in column] for column in split]


def picture(rows: Sequence[OperatorMeasurement], source: str) -> Figure:
    """Draws horizontal bars of the ratio to the reference in fp32, one panel per operator."""
    split = columns([group for group in grouped(rows, "operator").values() if bars(group)])
    width = COLUMN * len(split)
    height = HEAD + max(sum(panel_inches(panel) for panel in column) for column in split)
    figure = Figure(figsize=(width, height), facecolor=LIGHT.background)
    ratios = [1.0, *(row.ratio.median for row in bars(rows) if row.ratio)]
    for index, column in enumerate(split):
        left, bottom = COLUMN * index + MARGIN + LABELS, height - HEAD
        for panel in column:
            bottom -= panel_inches(panel)
            box = (left / width, (bottom + 0.45) / height, BARS / width, (panel_inches(panel) - AROUND) / height)
            draw_panel(figure.add_axes(box), panel, (min(ratios) / 1.25, max(ratios) * 1.3))
    write_head(figure, rows, source)
    return figure


def draw_panel(axis: Axes, rows: Sequence[OperatorMeasurement], limits: tuple[float, float]) -> None:
    directions = len({row.direction for row in rows}) > 1
    y, places, names = 0.0, [], []
    for group in grouped(bars(rows), "case").values():
        places.append(y + BAR * (len(group) - 1) / 2)
        names.append(group[0].shape + (f"\n{group[0].direction}" if directions else ""))
        for row in group:
            draw_bar(axis, y, row)
            y += BAR
        y += GAP
    axis.set(xscale="log", xlim=limits, ylim=(y - GAP, -BAR))
    axis.set_yticks(places, names, fontsize=7.5, ha="left")
    axis.tick_params(axis="x", colors=LIGHT.muted, labelsize=7.5, length=0)
    axis.tick_params(axis="y", colors=LIGHT.text, length=0, pad=72 * LABELS)
    axis.set_title(rows[0].operator, loc="left", fontsize=10, fontweight="bold", color=LIGHT.text, x=-LABELS / (BARS))
    axis.axvline(1, color=LIGHT.text, linewidth=0.9)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", color=LIGHT.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_bar(axis: Axes, y: float, row: OperatorMeasurement) -> None:
    assert row.ratio is not None
    faster = row.ratio.median >= 1
    axis.barh(y, row.ratio.median - 1, left=1, height=0.85 * BAR, color=COLORS[row.implementation], linewidth=0)
    axis.annotate(
        f"{row.ratio.median:.2f}",
        (row.ratio.median, y),
        xytext=(3 if faster else -3, 0),
        textcoords="offset points",
        ha="left" if faster else "right",
        va="center_baseline",
        fontsize=6.5,
        color=LIGHT.muted,
    )


def write_head(figure: Figure, rows: Sequence[OperatorMeasurement], source: str) -> None:
    width, height = figure.get_size_inches()
    left, at = MARGIN / width, lambda inches: 1 - inches / height
    title = "Speed relative to the plain form in fp32: longer to the right is faster"
    figure.text(left, at(0.27), title, fontsize=11.5, color=LIGHT.text)
    figure.text(left, at(0.46), source, fontsize=6.5, color=LIGHT.muted)
    shown = [name for name in COLORS if any(row.implementation == name for row in bars(rows))]
    handles = [Patch(color=COLORS[name], label=name) for name in shown]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, at(0.56)),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        labelcolor=LIGHT.text,
        handlelength=1.2,
        handleheight=0.8,
        columnspacing=1.4,
        borderpad=0.2,
        borderaxespad=0,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.draw", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON that make bench saved")
    path = parser.parse_args(arguments).results
    saved = read(path)
    rows, steps, source = saved.operators, saved.steps, saved.source
    if not rows and not steps:
        raise SystemExit(f"{path} holds no measured cases; run make bench with a file of an operator or of steps")
    table = path.with_suffix(".md")
    texts = ([step_markdown(steps, source)] if steps else []) + ([markdown(rows, source)] if rows else [])
    table.write_text("\n".join(texts))
    print(table)
    pictures = {"-steps.png": step_picture(steps, source)} if steps else {}
    if bars(rows):
        pictures[".png"] = picture(rows, source)
    for ending, figure in pictures.items():
        image = path.with_name(path.stem + ending)
        figure.savefig(image, dpi=DOTS_PER_INCH)
        print(image)


if __name__ == "__main__":
    main()
