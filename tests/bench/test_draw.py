"""bench/draw.py: tables and pictures of saved benchmarks."""

from typing import Any

import pytest
from saved_benchmarks import save, step_row

from bench import draw
from bench.measurement import OperatorMeasurement, Ratio
from bench.steps import EAGER, KEPT, REFERENCE

MIB = 2**20


def row(backend: str, *, dtype: str = "fp32", operator: str = "divide", **changes) -> OperatorMeasurement:
    known: dict[str, Any] = dict(
        operator=operator, shape="N 1", direction="forward", backend=backend, dtype=dtype, seconds=[0.002]
    )
    known |= dict(ratio=None, like_with_like=None, peak_bytes=3 * MIB)
    return OperatorMeasurement(**(known | changes))


def test_table_has_no_figure_for_what_was_not_measured():
    rows = [row("reference"), row("torch", ratio=Ratio(2.0, 1.5, 4.0), peak_bytes=None)]
    assert draw.markdown(rows, "somewhere").splitlines()[4:] == [
        "| case | implementation | median ms | x reference fp32 | x reference bf16 | peak MiB |",
        "|---|---|--:|--:|--:|--:|",
        "| divide: N 1, forward | reference fp32 | 2.000 | - | - | 3.0 |",
        "|  | torch fp32 | 2.000 | 2.00 (1.50 to 4.00) | - | - |",
    ]


def test_picture_shows_what_was_measured_and_nothing_else():
    slower, faster = Ratio(0.5, 0.4, 0.6), Ratio(2.0, 1.5, 4.0)
    rows = [
        row("reference"),
        row("torch", ratio=slower),
        row("reference", operator="combine"),
        row("torch", ratio=faster, operator="combine"),
    ]
    figure = draw.picture(rows, "somewhere")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["divide", "combine"]
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [["0.50"], ["2.00"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["torch fp32"]


def test_rows_of_steps_survive_json_and_are_drawn(tmp_path):
    rows = [step_row(REFERENCE), step_row(EAGER, seconds=0.5, ratio=Ratio(4.0, 3.5, 4.5))]
    peers = [step_row(KEPT, kind="peers"), step_row("byol", kind="peers", ratio=Ratio(1.0, 0.9, 1.1))]
    path = save(tmp_path / "run.json", [*rows, *peers])
    saved = draw.read(path)
    assert saved.steps == [*rows, *peers]
    assert saved.source == (
        "somewhere, 2 threads; torch 1, lightly 2; commit 0123456789 with uncommitted changes; 2026-01-02"
    )
    draw.main([str(path)])
    text = (tmp_path / "run.md").read_text()
    assert "| + kernels | 0.500 | 8.0 | 2.000 | 4.00 (3.50 to 4.50) | 1.00 |" in text
    assert (tmp_path / "run-steps.png").read_bytes().startswith(b"\x89PNG")
    figure = draw.step_picture(saved.steps, saved.source)
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [
        ["2.0", "8.0   4.00x"],
        ["0.50", "0.50   1.00x"],
    ]


def test_what_is_no_result_is_named(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit, match=r"other.json.*make bench \(KeyError"):
        draw.read(tmp_path / "other.json")
