"""Comparison of several runs: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mnclglf.config import require
from mnclglf.reports.figures import MARKED, Drawing, dress_steps, inline_svg
from mnclglf.reports.page import is_thinned, page, state_line
from mnclglf.reports.pictures import Small, queries_of
from mnclglf.reports.quality_page import FIGURES, quality_table
from mnclglf.reports.run_files import RunFiles, read_run
from mnclglf.reports.tables import percent, result_table
from mnclglf.runs.files import check_writable, write_atomically

MOST_RUNS = 8
# Each stands out from a white page and from a dark one.
COLORS = ("#3f8fd2", "#d9730d", "#2a9d6f", "#c45ab3", "#a08000", "#7b68ee", "#d1495b", "#708090")
# What is drawn of each run, with its unit; other terms of the loss follow.
DRAWN = {
    "loss": "loss",
    "feature_std": "std x sqrt(F)",
    "effective_rank": "dimensions",
    "neighbor_agreement": "fraction",
    "images_per_second": "images / s",
}


class Compared(NamedTuple):
    """A run, as its column is headed."""

    name: str
    color: str
    state: str


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Writes one page that shows several runs side by side.

    Returns:
        The path of the page.

    Raises:
        NotADirectoryError: one of the folders is none.
        ValueError: there are too few or too many runs, one is named twice, or a file of one is damaged.
    """
    require(
        2 <= len(folders) <= MOST_RUNS, f"{len(folders)} runs are named; a comparison is of 2 to {MOST_RUNS} of them"
    )
    require(len({folder.resolve() for folder in folders}) == len(folders), "one run is named twice; name each once")
    require(not path.is_dir(), f"{path} is a folder; give the file of the page, as comparison.html")
    check_writable(path.absolute().parent, "give another --out")
    runs = [replace(run, metrics=run.metrics.thinned()) for run in map(read_run, folders)]  # one long run at a time
    names = short_names(folders)
    context: dict[str, Any] = {
        "runs": [Compared(name, color, state_line(run)) for name, color, run in zip(names, COLORS, runs, strict=False)],
        "settings": differing_settings([run.config or {} for run in runs]),
        "results": results_side_by_side([run.results for run in runs]),
        "quality": quality_side_by_side([run.quality for run in runs]),
        "curves": curves(names, runs),
        "thinned": any(map(is_thinned, runs)),
        "queries": neighbors_side_by_side(names, runs),
    }
    text = page("compare.html.jinja", context)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns the last parts of the paths: as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    return next(
        names
        for n in range(1, longest + 1)
        if len(set(names := ["/".join(part[-n:]) for part in parts])) == len(parts) or n == longest
    )


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns each setting that is not the same in all runs, with its value in each; "not set" where it is missing."""
    flat = [_flat(config) for config in configs]
    names = {name: None for values in flat for name in values}
    rows = [(name, [values.get(name, "not set") for values in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def results_side_by_side(
    results: Sequence[Sequence[Mapping[str, Any]]],
) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """Returns rows of title, remarks, and each run's top-1 of the pretrained encoder and whether it is the highest."""
    tables = [result_table(found) for found in results]
    rows = {(row.title, row.instead_of): None for table in tables for row in table.rows}
    made: list[tuple[str, str, list[tuple[str, bool]]]] = []
    for title, instead_of in rows:
        cells = [
            next((row.cells[0] for row in table.rows if (row.title, row.instead_of) == (title, instead_of)), None)
            for table in tables
        ]
        best = max((cell.top1 for cell in cells if cell is not None), default=None)
        if best is not None:
            shown = [("not run", False) if cell is None else (percent(cell.top1), cell.top1 == best) for cell in cells]
            made.append((title, instead_of, shown))
    return made


def quality_side_by_side(qualities: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, list[str]]]:
    """Returns rows of name, images, and each run's figure of the pretrained encoder, for every figure of quality.json.

    None is marked as the best: a collapsed encoder has the best alignment.
    """
    found = [quality_table([of for of in results if of["representation"] == "pretrained"]) for results in qualities]
    titles = {table["title"]: None for tables in found for table in tables}
    rows: list[tuple[str, str, list[str]]] = []
    for title in titles:
        figures = [next((of["figures"] for of in tables if of["title"] == title), None) for tables in found]
        for place, (_, name, _) in enumerate(FIGURES):
            rows.append((name, title, ["not run" if of is None else of[place]["values"][0] for of in figures]))
    return rows


def curves(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Drawing]:
    """Draws each figure that at least one run logged, with a line per run."""
    terms = sorted({key for run in runs for key in run.metrics.series if key.startswith("loss_")})
    drawn: list[Drawing] = []
    for key, unit in {"loss": "loss", **dict.fromkeys(terms, "loss"), **DRAWN}.items():
        lines = [run.metrics.of(key) for run in runs]
        if not any(len(steps) for steps, _ in lines):
            continue
        figure = Figure(figsize=(3.6, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        axis = figure.subplots()
        for (steps, values), color, name in zip(lines, COLORS, names, strict=False):
            axis.plot(steps, values, color=color, linewidth=1.4, marker="o" if len(steps) < 3 else None, label=name)
        title = key.replace("_", " ")
        dress_steps(axis, title, unit, MARKED)
        drawn.append(Drawing(title, inline_svg(figure, title)))
    return drawn


def neighbors_side_by_side(
    names: Sequence[str], runs: Sequence[RunFiles]
) -> list[tuple[Small, list[tuple[str, list[Small]]]]]:
    """Returns queries with the neighbors that each run's encoder finds; none unless all runs have the same queries."""
    if any("neighbors" not in run.gallery for run in runs):
        return []
    first = runs[0].gallery["queries"]
    if any(not np.array_equal(first, run.gallery["queries"]) for run in runs):
        return []
    found = [queries_of(run.gallery) for run in runs]
    return [
        (cards[0].query, [(name, card.rows[0][1]) for name, card in zip(names, cards, strict=True)])
        for cards in zip(*found, strict=True)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    made: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            made |= _flat(value, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            made[f"{prefix}{name}"] = "not set" if value is None else str(value)
    return made
