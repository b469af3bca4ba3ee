"""Tests of the written table: the numbers of finished runs and no others."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from tiny_reproduce import HandMade, tiny_table

from mnclglf.reproduce.plan import Reproduce, ScaleName, Table, TableName, make_table
from mnclglf.reproduce.table import write_table

pytestmark = pytest.mark.usefixtures("tiny_scale")
SETTINGS = {"solver": "logistic regression", "k": 20, "temperature": 0.07}
NUMBER = re.compile(r"\d+\.\d+")


class Written:
    """Contents of the four files of a table."""

    def __init__(self, table: Table, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        paths = {path.suffix: path for path in write_table(table, folder)}
        self.markdown = paths[".md"].read_text()
        self.csv = list(csv.DictReader(io.StringIO(paths[".csv"].read_text())))
        self.json = json.loads(paths[".json"].read_text())
        self.picture = imread(paths[".png"])

    def cells(self, label: str) -> list[str]:
        """Returns the cells of the first line of the Markdown that begins with this label."""
        rows = [line.strip("| ").split(" | ") for line in self.markdown.splitlines() if line.startswith("| ")]
        return next([cell.strip() for cell in row] for row in rows if row[0] == label)


@pytest.mark.parametrize(
    ("name", "scale"), [(f"table{n}", scale) for n in (3, 4, 5, 6) for scale in ("paper", "small")]
)
def test_without_runs_no_number_is_ours(name: TableName, scale: ScaleName, tmp_path: Path) -> None:
    table = make_table(Reproduce(table=name, scale=scale, seeds=2))
    written = Written(table, tmp_path / "out")
    for line in written.csv:
        ours = {key: value for key, value in line.items() if key.endswith(("_mean", "_std"))}
        assert set(ours.values()) == {""}
        assert (line["runs"], line["state"]) == ("0", "not run")
    for row in written.json["rows"]:
        assert (row["ours"], row["runs"], row["state"]) == (None, [], "not run")
    rows = [line for line in written.markdown.splitlines() if line.startswith("| ") and "not run" in line]
    assert len(rows) == len(table.rows)
    for line, row in zip(rows, table.rows, strict=True):
        printed = NUMBER.findall(line.removeprefix(f"| {row.label} "))
        assert printed == [f"{value:.2f}" for value in (row.paper or ()) if value is not None]
    assert written.picture.std() > 0.02


def test_mean_deviation_and_state_of_measured_runs(tmp_path: Path, hand_made: HandMade) -> None:
    table = tiny_table("table6", seeds=2)
    row = table.rows[0]  # k = 1
    for config, top1 in zip(row.configs, (0.8, 0.82), strict=True):
        hand_made.train(config)
        hand_made.evaluate(config, top1)
    written = Written(table, tmp_path / "out")
    # By hand: means 81, 90.5, 40.5; deviations of two values are their distance over the square root of 2.
    assert written.cells("k = 1") == [
        "k = 1",
        "89.54",
        "99.73",
        "81.00 ± 1.41 (n = 2)",
        "90.50 ± 0.71 (n = 2)",
        "40.50 ± 0.71 (n = 2)",
        "measured: seeds 0, 1; epoch 4 of 4; an abacus; commit abc1234",
    ]
    (line,) = [line for line in written.csv if line["row"] == "k = 1"]
    assert (line["top1_mean"], line["top1_std"], line["paper_top1"], line["runs"]) == ("81.00", "1.41", "89.54", "2")
    (found,) = [found for found in written.json["rows"] if found["row"] == "k = 1"]
    assert found["ours"]["top1"] == {"mean": pytest.approx(81), "std": pytest.approx(2**0.5)}
    assert [(run["seed"], run["top1"], run["step"]) for run in found["runs"]] == [(0, 0.8, 12), (1, 0.82, 12)]
    assert found["differs_from_settings"] == ["objective.k: 2 -> 1"]
    assert written.cells("k = 3")[3:] == ["not run"] * 4


def test_a_record_without_its_time_and_epoch_does_not_end_a_table(tmp_path: Path, hand_made: HandMade) -> None:
    table = tiny_table("table6")
    (config,) = table.rows[0].configs
    metrics = hand_made.train(config) / "metrics.jsonl"
    hand_made.evaluate(config, 0.8)
    with metrics.open("a") as file:
        file.write('{"step": 13}\n')
    (found,) = [found for found in Written(table, tmp_path / "out").json["rows"] if found["row"] == "k = 1"]
    assert [run["training_seconds"] for run in found["runs"]] == [24.0]


def test_a_seed_that_is_lacking_is_named(tmp_path: Path, hand_made: HandMade) -> None:
    table = tiny_table("table6", seeds=3)
    config = table.rows[0].configs[1]
    hand_made.train(config)
    hand_made.evaluate(config, 0.5)
    cells = Written(table, tmp_path / "out").cells("k = 1")
    assert cells[3] == "50.00 (n = 1)"
    assert cells[-1] == "measured: seed 1; epoch 4 of 4; an abacus; commit abc1234; seeds 0, 2 not run"


def test_a_run_counts_for_every_table_that_needs_it(tmp_path: Path, hand_made: HandMade) -> None:
    config = next(row for row in tiny_table("table6").rows if row.label == "k = 2").configs[0]
    hand_made.train(config)
    hand_made.evaluate(config, 0.7)
    hand_made.evaluate(config, 0.6, epoch=1)
    hand_made.evaluate(config, 0.1, representation="untrained")
    labels: dict[TableName, str] = {
        "table3": "MNCLGLF",
        "table4": "lambda 6",
        "table6": "k = 2",
        "table5": "MNCLGLF, after 100% of the epochs",
    }
    for name, label in labels.items():
        written = Written(tiny_table(name), tmp_path / "out")
        assert written.cells(label)[3] == "70.00 (n = 1)"
        cells = written.cells("Untrained encoder")
        assert cells[1:4] == ["", "", "10.00 (n = 1)"]
        assert cells[-1].startswith("measured: seed 0; 0 epochs; ")
    written = Written(tiny_table("table5"), tmp_path / "out")
    assert written.cells("MNCLGLF, after 25% of the epochs")[3] == "60.00 (n = 1)"
    assert written.cells("MNCLGLF, after 50% of the epochs")[3:] == ["not run"] * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {**SETTINGS, "step": 9}},  # of an earlier checkpoint
        {"settings": SETTINGS},
        {"settings": {**SETTINGS, "step": 12, "k": 1}},  # as `mnclglf knn RUN --k 1` leaves it
        {"settings": {**SETTINGS, "step": 12, "solver": "another"}},
        {"split": "validation"},
        {"label_share": 0.1},
        {"representation": "raw pixels"},
    ],
)
def test_a_number_of_something_else_is_not_taken(changes: dict[str, Any], tmp_path: Path, hand_made: HandMade) -> None:
    table = tiny_table("table6")
    config = table.rows[0].configs[0]
    hand_made.train(config)
    hand_made.evaluate(config, 0.9, settings={**SETTINGS, "step": 12})
    assert "90.00 (n = 1)" in Written(table, tmp_path / "out").cells("k = 1")
    (tmp_path / "out" / "runs" / table.runs()[0].name / "evaluation.json").unlink()
    hand_made.evaluate(config, 0.9, **changes)
    assert Written(table, tmp_path / "out").cells("k = 1")[3:] == ["not run"] * 4


def test_a_run_of_other_settings_is_not_taken(tmp_path: Path, hand_made: HandMade) -> None:
    table = tiny_table("table6")
    config = table.rows[0].configs[0]
    folder = hand_made.train(replace(config, optim=replace(config.optim, lr=0.7)))
    assert folder.name == table.runs()[0].name
    hand_made.evaluate(config, 0.9)
    assert Written(table, tmp_path / "out").cells("k = 1")[3:] == ["not run"] * 4


def test_settings_are_said_where_the_numbers_are(tmp_path: Path) -> None:
    written = Written(make_table(Reproduce(table="table3", scale="small")), tmp_path / "out")
    assert "not the paper's setting" in written.markdown
    assert "96 training images at 8 x 8, ResNet-18 of width 2" in written.markdown
    assert "paper: CIFAR10, top-1" in written.markdown
    assert written.json["setting_of_the_paper"] is False
    assert written.json["settings"]["digits"]["optim"]["epochs"] == 4
