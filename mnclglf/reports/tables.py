"""Evaluation results as a table: a row for each protocol and split, a column for each representation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

REPRESENTATIONS = ("pretrained", "untrained", "raw pixels")  # always shown; others follow
PROTOCOLS = {
    "knn": "k nearest neighbors",
    "linear": "Linear classifier, all labels",
    "linear_10_labels": "Linear classifier, 10 labels a class",
}
SETTING_NAMES = {
    "k": "k",
    "temperature": "vote temperature",
    "solver": "",
    "C": "C",
    "draws": "draws of labels",
    "train_images": "training images",
    "test_images": "images classified",
    "step": "checkpoint after step",
}
COUNTED = {"train_images", "test_images", "draws"}  # "5 draws of labels" rather than "draws of labels 5"
UNSHOWN = {"classes", "note", "per_class", "seed"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One representation's result. Fractions of the images classified."""

    top1: float
    top5: float
    deviation: float | None
    notes: tuple[str, ...]
    """What is said of this number alone."""
    best: bool
    """No other of the row has a higher top-1."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One protocol on one split."""

    title: str
    details: str
    """The settings that all cells share, in words."""
    cells: tuple[Cell | None, ...]
    """In the order of the table's representations; None where it was not run."""


class ResultTable(NamedTuple):
    """Protocol x representation."""

    representations: tuple[str, ...]
    rows: list[Row]


def result_table(results: Sequence[Mapping[str, Any]]) -> ResultTable:
    """The table of the results in evaluation.json; of results for the same cell the last counts.

    Args:
        results: each with protocol, representation, top1 and top5, and perhaps split, deviation and settings.
    """
    cells: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for result in results:
        row = cells.setdefault((str(result["protocol"]), str(result.get("split") or "test")), {})
        row[str(result["representation"])] = result
    found = {name: None for row in cells.values() for name in row}
    representations = (*REPRESENTATIONS, *(name for name in found if name not in REPRESENTATIONS))
    order = list(PROTOCOLS)
    keys = sorted(cells, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key))
    return ResultTable(representations, [_row(key, cells[key], representations) for key in keys])


def percent(fraction: float) -> str:
    """A fraction as a percentage with one digit, without the sign."""
    return f"{100 * fraction:.1f}"


def to_markdown(table: ResultTable) -> str:
    """The table as Markdown; every number in percent, top-1 and then top-5."""
    lines = [
        "| Top-1 / top-5, % | " + " | ".join(map(_escape, table.representations)) + " |",
        "|---" + "|--:" * len(table.representations) + "|",
    ]
    for row in table.rows:
        details = f" ({row.details})" if row.details else ""
        lines.append(f"| {_escape(row.title + details)} | " + " | ".join(map(_markdown_cell, row.cells)) + " |")
    return "\n".join(lines) + "\n"


def _row(key: tuple[str, str], results: Mapping[str, Mapping[str, Any]], representations: Sequence[str]) -> Row:
    protocol, split = key
    settings = [dict(result.get("settings") or {}) for result in results.values()]
    shared = {name: value for name, value in settings[0].items() if all(value == s.get(name) for s in settings)}
    best = max(result["top1"] for result in results.values())
    title = PROTOCOLS.get(protocol, protocol)
    return Row(
        title=title if split == "test" else f"{title} ({split} images)",
        details=_describe(shared),
        cells=tuple(_cell(results.get(name), shared, best) for name in representations),
    )


def _cell(result: Mapping[str, Any] | None, shared: Mapping[str, Any], best: float) -> Cell | None:
    if result is None:
        return None
    settings: dict[str, Any] = dict(result.get("settings") or {})
    own = _describe({name: value for name, value in settings.items() if name not in shared})
    return Cell(
        top1=result["top1"],
        top5=result["top5"],
        deviation=result.get("deviation"),
        notes=tuple(text for text in (own, settings.get("note")) if text),
        best=result["top1"] == best,
    )


def _describe(settings: Mapping[str, Any]) -> str:
    """Settings in words: "k 20, 4,000 training images"."""
    parts: list[str] = []
    for name, value in settings.items():
        if name in UNSHOWN:
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        label = SETTING_NAMES.get(name, name.replace("_", " "))
        parts.append(f"{text} {label}" if name in COUNTED else f"{label} {text}".strip())
    return ", ".join(parts)


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    top1 = percent(cell.top1) if cell.deviation is None else f"{percent(cell.top1)} ± {percent(cell.deviation)}"
    notes = f" ({'; '.join(cell.notes)})" if cell.notes else ""
    return f"{f'**{top1}**' if cell.best else top1} / {percent(cell.top5)}{_escape(notes)}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
