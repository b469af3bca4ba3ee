"""Writes a table as Markdown, CSV, JSON and a picture, with the paper's numbers beside ours.

Our numbers come only from finished runs; all other cells say that they were not run.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnclglf.config import RunConfig, to_dict
from mnclglf.reports.figures import DotPanel, Dots, dot_chart
from mnclglf.reproduce.paper import PaperResult
from mnclglf.reproduce.plan import PAPER_EPOCHS, TITLES, Row, Table, run_name
from mnclglf.reproduce.results import Measurement, measurements
from mnclglf.runs.files import differences, write_atomically

NOT_RUN = "not run"
DATASET_TITLES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "tinyimagenet": "TinyImageNet"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """Row of a table with its measurements."""

    row: Row
    measured: tuple[Measurement, ...]

    def values(self, name: str) -> list[float]:
        """Returns the value of each measured seed in percent; name is top1, top5 or knn_top1."""
        found = [getattr(measurement, name) for measurement in self.measured]
        return [100 * value for value in found if value is not None]

    def state(self) -> str:
        """Returns "measured" (seeds, epochs, hardware, commit), or "not run"."""
        done = {measurement.seed for measurement in self.measured}
        lacking = [config.seed for config in self.row.configs if config.seed not in done]
        if not done:
            return NOT_RUN
        epochs = self.row.configs[0].optim.epochs
        parts = [
            f"measured: {_seeds(sorted(done))}",
            "0 epochs" if self.row.representation == "untrained" else f"epoch {self.row.epoch} of {epochs}",
            *_unique(measurement.environment["device"] for measurement in self.measured),
            *_unique(f"commit {measurement.environment['commit'] or 'unknown'}" for measurement in self.measured),
        ]
        return "; ".join([*parts, f"{_seeds(lacking)} {NOT_RUN}"] if lacking else parts)


def lines_of(table: Table, runs: Path) -> list[Line]:
    """Returns the table's rows, each with its measurements in the run directories."""
    return [Line(row=row, measured=tuple(measurements(row, runs, table.scale))) for row in table.rows]


def write_table(table: Table, folder: Path) -> list[Path]:
    """Writes FOLDER/TABLE.md, .csv, .json and .png from the runs in FOLDER/runs; returns their paths."""
    lines = lines_of(table, folder / "runs")
    files = {
        "md": to_markdown(table, lines).encode(),
        "csv": to_csv(table, lines).encode(),
        "json": (json.dumps(to_json(table, lines), indent=2, allow_nan=False) + "\n").encode(),
        "png": to_picture(table, lines),
    }
    for suffix, content in files.items():
        _write(folder / f"{table.name}.{suffix}", content)
    return [folder / f"{table.name}.{suffix}" for suffix in files]


def to_markdown(table: Table, lines: Sequence[Line]) -> str:
    """Returns the table with its settings as Markdown, one part per data set."""
    knn = "knn" in table.scale.protocols
    parts = [f"# {TITLES[table.name]}", _introduction(table)]
    for dataset, group in _by_dataset(lines).items():
        paper = f"paper: {DATASET_TITLES[group[0].row.paper_dataset]}"
        heads = ["", f"{paper}, top-1", "top-5", f"ours: {_title(dataset)}, top-1", "top-5", *(["k-NN top-1"] * knn)]
        rows = [
            [
                line.row.label,
                *_paper_cells(line.row.paper),
                summary(line.values("top1")),
                summary(line.values("top5")),
                *([summary(line.values("knn_top1"))] * knn),
                line.state(),
            ]
            for line in group
        ]
        parts += [
            f"## {_title(dataset)}",
            f"Ours: {describe(_base(group))}.",
            _grid([*heads, "state"], rows),
        ]
    return "\n\n".join([*parts, f"![accuracies]({table.name}.png)"]) + "\n"


def to_csv(table: Table, lines: Sequence[Line]) -> str:
    """Returns one line per row; a cell without a measurement or a number of the paper is empty."""
    names = ("top1", "top5", "knn_top1")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ours = [f"{name}_{figure}" for name in names for figure in ("mean", "std")]
    heads = ["table", "scale", "row", "dataset", "epoch", "paper_dataset", "paper_top1", "paper_top5"]
    writer.writerow([*heads, *ours, "runs", "state"])
    for line in lines:
        row, paper = line.row, line.row.paper
        figures = [figure for name in names for figure in _mean_and_deviation(line.values(name))]
        writer.writerow(
            [table.name, table.scale.name, row.label, row.dataset, row.epoch, row.paper_dataset]
            + ["" if value is None else f"{value:.2f}" for value in (*(paper or (None, None)), *figures)]
            + [len(line.measured), line.state()]
        )
    return buffer.getvalue()


def to_json(table: Table, lines: Sequence[Line]) -> dict[str, Any]:
    """Returns the settings, the paper's numbers, and each measurement with its run, hardware and commit."""
    return {
        "table": table.name,
        "title": TITLES[table.name],
        "scale": table.scale.name,
        "setting_of_the_paper": table.scale.of_paper,
        "protocol": table.scale.protocol_text,
        "unit": "percent of the test images",
        "settings": {dataset: to_dict(_base(group)) for dataset, group in _by_dataset(lines).items()},
        "rows": [_row_json(line, _base(group)) for group in _by_dataset(lines).values() for line in group],
    }


def to_picture(table: Table, lines: Sequence[Line]) -> bytes:
    """Draws top-1 of every row: the paper's beside ours in the paper's setting, else in a separate panel."""
    groups = _by_dataset(lines)
    labels = [line.row.label for line in next(iter(groups.values()))]
    panels: list[DotPanel] = []
    for dataset, group in groups.items():
        ours = Dots("ours", [line.values("top1") for line in group], color=0, absent=NOT_RUN)
        paper = Dots("paper", [[] if line.row.paper is None else [line.row.paper.top1] for line in group], color=1)
        epochs = group[0].row.configs[0].optim.epochs
        if table.scale.of_paper:
            panels.append(DotPanel(_title(dataset), [ours, paper]))
        else:
            other = DATASET_TITLES[group[0].row.paper_dataset]
            panels.append(DotPanel(f"ours: {_title(dataset)}, {epochs} epochs", [ours]))
            panels.append(DotPanel(f"paper: {other}, {PAPER_EPOCHS} epochs", [paper]))
    return dot_chart(labels, panels, heading=TITLES[table.name], unit="top-1, %")


def summary(values: Sequence[float]) -> str:
    """Returns mean, standard deviation (n - 1) and number of values, or "not run"."""
    mean, deviation = _mean_and_deviation(values)
    if mean is None:
        return NOT_RUN
    return f"{mean:.2f} (n = 1)" if deviation is None else f"{mean:.2f} ± {deviation:.2f} (n = {len(values)})"


def describe(config: RunConfig) -> str:
    """Returns the settings common to the rows of a table, in words."""
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    images = "all training images" if data.train_images is None else f"{data.train_images:,} training images"
    side = "their own size" if data.image_size is None else f"{data.image_size} x {data.image_size}"
    return (
        f"{images} at {side}, ResNet-18 of width {model.width}, projector {model.projector_width}, {optim.epochs} "
        f"epochs of batch {optim.batch_size}, SGD with lr {optim.lr:g}, warm-up {optim.warmup_epochs:g} epochs and "
        f"weight decay {optim.weight_decay:g}, temperature {objective.temperature:g}, queue "
        f"{objective.queue_size:,}, m {objective.ema_momentum:g}, the views of recipe {config.recipe}"
    )


def _introduction(table: Table) -> str:
    protocol = f"Accuracy on the test images in percent, by {table.scale.protocol_text}."
    kind = "± is the standard deviation over seeds (n - 1)."
    if table.name == "table3":
        kind += " Supervised: the encoder that was trained with labels, evaluated like the others."
    if table.scale.of_paper:
        return f"Scale `paper`: Table 2's settings. {protocol} {kind}"
    return (
        f"Scale `{table.scale.name}`: **not the paper's setting**, but other images, a smaller network and fewer "
        "epochs, the same for every row. The paper's numbers are there to compare the order of the rows, not their "
        f"height. {protocol} {kind}"
    )


def _row_json(line: Line, base: RunConfig) -> dict[str, Any]:
    row = line.row
    summaries = {name: _mean_and_deviation(line.values(name)) for name in ("top1", "top5", "knn_top1")}
    return {
        "row": row.label,
        "dataset": row.dataset,
        "epoch": row.epoch,
        "representation": row.representation,
        "differs_from_settings": differences(base, row.configs[0]),
        "paper": None if row.paper is None else {"dataset": row.paper_dataset, **row.paper._asdict()},
        "ours": {name: {"mean": mean, "std": deviation} for name, (mean, deviation) in summaries.items()}
        if line.measured
        else None,
        "state": line.state(),
        "runs": [asdict(measurement) for measurement in line.measured],
    }


def _base(group: Sequence[Line]) -> RunConfig:
    """Returns MNCLGLF's standard settings, for which every table has a row."""
    configs = [line.row.configs[0] for line in group]
    return next(config for config in configs if run_name(config) == f"mnclglf-{config.dataset}-seed0")


def _by_dataset(lines: Iterable[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.row.dataset, []).append(line)
    return groups


def _mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _title(dataset: str) -> str:
    return DATASET_TITLES.get(dataset, dataset)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _paper_cells(paper: PaperResult | None) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in (paper or (None, None))]


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|---" + "|--:" * (len(heads) - 2) + "|---|"
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
