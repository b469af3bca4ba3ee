"""Evaluation results as a table: one row per protocol, data set, settings, label share, checkpoint and split.

One column per representation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnclglf.runs.console import say
from mnclglf.runs.results import DEFAULTS, changed_settings

REPRESENTATIONS = ("pretrained", "untrained", "raw pixels")  # always shown; others follow
PROTOCOLS = {  # in the order of the rows: few labels first, where pre-training matters
    "logistic_10_labels": "Logistic regression, 10 labels per class",
    "logistic": "Logistic regression, all labels",
    "knn": "k nearest neighbors",
    "linear": "Linear evaluation, all labels",
    "finetune": "Fine-tuning, all labels",
}
SETTING_NAMES = {
    "k": "k",
    "temperature": "vote temperature",
    "optimizer": "",
    "C": "C",
    "batch_size": "batches of",
    "asked_batch_size": "as many steps as with batches of",
    "draws": "draws of labels",
    "train_images": "training images",
    "test_images": "images classified",
    "step": "checkpoint after step",
}
COUNTED = {
    "train_images",
    "test_images",
    "draws",
    "epochs",
    "steps",
    "runs",
}  # "5 draws of labels", not "draws of labels 5"
SINGULAR = {"epochs": "epoch", "steps": "step", "runs": "run", "draws of labels": "draw of labels"}
INSTEAD_OF = {
    "asked_batch_size": "batch_size",
    "steps": "epochs",
}  # settings without a default of their own, and what they replace
UNSHOWN = {"classes", "note", "per_class", "seed", "solver", "subset"} | {
    "momentum", "weight_decay", "nesterov", "trust_coefficient", "view", "loader", "precision"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Result of one representation; accuracies are fractions of the images."""

    top1: float
    top5: float
    deviation: float | None
    notes: tuple[str, ...]
    """Remarks on this number alone."""
    best: bool
    """True if no other cell of the row has a higher top-1."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of one protocol on one split."""

    title: str
    dataset: str | None = None
    """Data set that was evaluated on; None for the run's own."""
    details: str
    """Settings common to all cells, in words."""
    instead_of: str
    """The protocol's defaults that other settings replaced, in words; empty if there are none."""
    cells: tuple[Cell | None, ...]
    """Cells, one per representation of the table; None for one that was not run."""

    @property
    def remarks(self) -> str:
        """Returns what stands beside the title: the details, and the replaced defaults."""
        return "; ".join(text for text in (self.details, self.instead_of) if text)


class Measured(NamedTuple):
    """Key of a table's row."""

    protocol: str
    dataset: str | None
    """Data set that was evaluated on; None is the run's own."""
    label_share: float
    epoch: float | None
    """Epoch of the checkpoint; None is the run's newest."""
    split: str
    changed: tuple[tuple[str, Any], ...]
    """Settings that differ from the protocol's defaults."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Measured:
        share, epoch, split = result.get("label_share", 1.0), result.get("epoch"), result.get("split")
        protocol = str(result["protocol"])
        changed = changed_settings(protocol, result.get("settings") or {})
        dataset = None if result.get("dataset") is None else printable(str(result["dataset"]))
        return cls(protocol, dataset, share, epoch, str(split or "test"), tuple(changed.items()))

    @property
    def title(self) -> str:
        title = PROTOCOLS.get(self.protocol, self.protocol)
        if self.label_share != 1:
            title = f"{title.removesuffix(', all labels')}, {100 * self.label_share:g}% of the labels"
        if self.epoch is not None:
            title = f"{title}, after epoch {self.epoch:g}"
        if self.dataset is not None:
            title = f"{title}, on {self.dataset}"
        return title if self.split == "test" else f"{title} ({self.split} images)"

    @property
    def place(self) -> tuple[Any, ...]:
        """Returns the sort key of the row: the run's own data first, default settings first, by protocol, all labels
        first, newest checkpoint last."""
        known = list(PROTOCOLS)
        order = known.index(self.protocol) if self.protocol in known else len(known)
        epoch = math.inf if self.epoch is None else self.epoch
        changed = tuple((name, str(value)) for name, value in self.changed)
        return self.dataset or "", bool(changed), order, self.protocol, -self.label_share, self.split, epoch, changed

    @property
    def instead_of(self) -> str:
        """Returns the defaults that were changed, in words; empty if none was."""
        defaults = DEFAULTS.get(self.protocol, {})
        names = [INSTEAD_OF.get(name, name) for name, _ in self.changed]
        usual = _describe({name: defaults[name] for name in names})
        return f"instead of the default {usual}" if self.changed else ""


class ResultTable(NamedTuple):
    """Table of protocols x representations; rows of the run's own data and of default settings come first."""

    representations: tuple[str, ...]
    rows: list[Row]


def result_table(results: Sequence[Mapping[str, Any]]) -> ResultTable:
    """Returns the table of the results in evaluation.json; the last result for a cell is used.

    Args:
        results: results with protocol, representation, top1 and top5, and optionally split, label_share, epoch,
            deviation and settings.
    """
    cells: dict[Measured, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        cells.setdefault(Measured.of(result), {})[str(result["representation"])] = result
    found = {name: None for row in cells.values() for name in row}
    representations = (*REPRESENTATIONS, *(name for name in found if name not in REPRESENTATIONS))
    rows = sorted(cells, key=lambda row: row.place)
    return ResultTable(representations, [_row(row, cells[row], representations) for row in rows])


def verdict(table: ResultTable) -> list[str]:
    """Returns what a table says in sentences: one for its first row, and one for each row that raw pixels win.

    Rows with all defaults on test images are read, that have both the pretrained encoder and raw pixels.
    """
    lines: list[str] = []
    for row in table.rows:
        cells = dict(zip(table.representations, row.cells, strict=True))
        ours, untrained, pixels = (cells.get(name) for name in REPRESENTATIONS)
        if row.title not in PROTOCOLS.values() or row.instead_of or ours is None or pixels is None:
            continue
        learned, other = percent(ours.top1), percent(pixels.top1)
        if not lines:
            start = "" if untrained is None else f" {percent(untrained.top1)}% by the untrained network's,"
            lines.append(f"{row.title}: {learned}% right by the learned features,{start} {other}% by raw pixels.")
        if pixels.top1 > ours.top1:
            lines.append(f"{row.title}: raw pixels win, {other}% against {learned}% by the learned features.")
    return lines


def mean_over_runs(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the mean over the runs of each result that all have, with top-1's standard deviation (n - 1).

    Args:
        runs: results of each run, for two or more runs.

    Raises:
        ValueError: the runs were evaluated on label subsets that were drawn in different ways.
    """
    by_cell = [{(Measured.of(result), result["representation"]): result for result in results} for results in runs]
    means: list[dict[str, Any]] = []
    for cell, first in by_cell[0].items():
        group = [results[cell] for results in by_cell if cell in results]
        subsets = {(result.get("settings") or {}).get("subset") for result in group}
        if len(subsets) > 1:
            raise ValueError(
                f"{cell[0].protocol} of {cell[1]}: the runs' label subsets were drawn in different ways "
                f"({', '.join(sorted(map(str, subsets)))}), so a mean would mix them; evaluate every run again"
            )
        if len(group) == len(runs):
            top1, top5 = ([result[name] for result in group] for name in ("top1", "top5"))
            settings = {"runs": len(runs), **_shared([dict(result.get("settings") or {}) for result in group])}
            mean = {"top1": statistics.fmean(top1), "top5": statistics.fmean(top5), "deviation": statistics.stdev(top1)}
            means.append({**first, **mean, "settings": settings})
    return means


def printable(text: str) -> str:
    """Returns text that UTF-8 can hold: bytes of a path that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()


def percent(fraction: float) -> str:
    """Returns a fraction in percent with one decimal, without the percent sign."""
    return f"{100 * fraction:.1f}"


def to_markdown(table: ResultTable) -> str:
    """Returns the table as Markdown, with top-1 and top-5 in percent."""
    lines = [
        "| Top-1 / top-5, % | " + " | ".join(map(_escape, table.representations)) + " |",
        "|---" + "|--:" * len(table.representations) + "|",
    ]
    lines += [
        f"| {_escape(f'{row.title} ({row.remarks})' if row.remarks else row.title)} | "
        + " | ".join(map(_markdown_cell, row.cells))
        + " |"
        for row in table.rows
    ]
    return "\n".join(lines) + "\n"


def print_table(table: ResultTable, console: Console) -> None:
    """Prints the table: as columns in a terminal, with the settings below; as Markdown in a pipe or a file."""
    if not console.is_terminal:
        say(console, to_markdown(table))
        return
    run = [i for i in range(len(table.representations)) if any(row.cells[i] is not None for row in table.rows)]
    shown = Table(title="Top-1 / top-5, %", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column()
    for i in run:
        shown.add_column(Text(table.representations[i]), justify="right")  # a Text is not parsed as markup
    for row in table.rows:
        shown.add_row(Text(row.title), *(_terminal_cell(row.cells[i]) for i in run))
    console.print(shown)
    for row in table.rows:
        if row.remarks:
            console.print(Text(f"{row.title}: {row.remarks}", "dim"))


def _terminal_cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("not run", "dim")
    notes = "".join(f"\n{note}" for note in cell.notes)
    top1 = (_top1(cell), "bold" if cell.best else "")
    return Text.assemble(top1, f" / {percent(cell.top5)}", (notes, "dim"))


def _top1(cell: Cell) -> str:
    return percent(cell.top1) if cell.deviation is None else f"{percent(cell.top1)} ± {percent(cell.deviation)}"


def _row(measured: Measured, results: Mapping[str, Mapping[str, Any]], representations: Sequence[str]) -> Row:
    shared = _shared([dict(result.get("settings") or {}) for result in results.values()])
    best = max(result["top1"] for result in results.values())
    return Row(
        title=measured.title,
        dataset=measured.dataset,
        details=_describe(shared),
        instead_of=measured.instead_of,
        cells=tuple(_cell(results.get(name), shared, best) for name in representations),
    )


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the settings that have the same value in all of them."""
    return {name: value for name, value in settings[0].items() if all(value == s.get(name) for s in settings)}


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
    """Returns settings in words, e.g. "k 20, 4,000 training images"."""
    parts: list[str] = []
    for name, value in settings.items():
        if name in UNSHOWN:
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        label = SETTING_NAMES.get(name, name.replace("_", " "))
        if value == 1:
            label = SINGULAR.get(label, label)
        parts.append(f"{text} {label}" if name in COUNTED else f"{label} {text}".strip())
    return ", ".join(parts)


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    top1 = _top1(cell)
    notes = f" ({'; '.join(cell.notes)})" if cell.notes else ""
    return f"{f'**{top1}**' if cell.best else top1} / {percent(cell.top5)}{_escape(notes)}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
