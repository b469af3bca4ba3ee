"""Tests of metrics.jsonl: its lines are JSON, and lines of other hands are read."""

import io
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnclglf.runs import metrics
from mnclglf.runs.metrics import copy_records, last_record, line_of, read_records, stream_records


def strict(text: str) -> Any:
    """Parses JSON as other readers do, jq or JavaScript, which know no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_null(value: float) -> None:
    line = line_of({"step": 3, "gradient_norm": value, "loss": 1.5, "neighbor_agreement": None})
    assert strict(line) == {"step": 3, "gradient_norm": None, "loss": 1.5, "neighbor_agreement": None}
    assert line.endswith("}\n")


def test_lines_of_earlier_versions_are_read_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "lr": Infinity, "a": 1e999}\n{"step": 2, "loss": 0.5, "lr": -Infinity}\n')
    assert read_records(path) == ([{"step": 1, "loss": None, "lr": None, "a": None},
                                   {"step": 2, "loss": 0.5, "lr": None}], 0)  # fmt: skip


def test_the_last_record_is_the_last_one_with_the_figure(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_record(path) is None
    lines = ['{"step": 1, "elapsed_seconds": 4}', '{"step": 2, "elapsed_seconds": 7.5}', '{"step": 3}',
             '{"step": 4, "elapsed_seconds": null}', '{"step": 5, "elapsed_seconds": "9"}',
             '{"step": 6, "elapsed_seconds": true}', '{"step": 7, "elapsed_seconds": NaN}',
             '{"step": 8, "ela']  # fmt: skip
    path.write_text("\n".join(lines))
    assert last_record(path, "elapsed_seconds") == {"step": 2, "elapsed_seconds": 7.5}
    assert last_record(path) == {"step": 7, "elapsed_seconds": None}
    assert last_record(path, "knn_top1") is None


@pytest.mark.parametrize("tail", [1, 7, 100])
def test_the_end_of_a_file_is_read_in_pieces(tail: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TAIL_BYTES", tail)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.25, "name": "é"}\n' + "".join(f'{{"step": {i}}}\n' for i in range(2, 40)))
    assert last_record(path) == {"step": 39}
    assert last_record(path, "epoch") == {"step": 1, "epoch": 0.25, "name": "é"}


@pytest.mark.parametrize("at_once", [1, 2, 5, 1024])
def test_lines_that_are_no_record_are_counted(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LINES_AT_ONCE", at_once)
    lines = ['{"step": 1}', '{"step": 2, "lo', '', '[3]', '{"step": 4}, {"step": 5}', '{"step": true}', '  ',
             '{"step": 6, "loss": 1}', '{"limit_share": 0.5, "step": 6}', '[' * 10**5, '{"step": 5}']  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    for torn in ("", '\n{"step": 8, "lo'):
        path.write_text("\n".join(lines) + torn)
        assert read_records(path) == ([{"step": 1}, {"step": 5}, {"step": 6, "roofline_fraction": 0.5}], 5)
    path.write_text("no\nrecord\n")
    for read in (read_records, lambda path: list(stream_records(path))):
        with pytest.raises(ValueError, match=r"metrics.jsonl holds 2 lines and not one record"):
            read(path)


def test_records_up_to_a_step_are_copied_as_they_are(tmp_path: Path) -> None:
    def copied(text: str, last_step: int) -> str:
        path, to = tmp_path / "metrics.jsonl", io.BytesIO()
        path.write_text(text)
        copy_records(path, to, last_step)
        return to.getvalue().decode()

    ours = "".join(line_of({"step": step, "loss": step / 3}) for step in (10, 20, 30))
    assert copied(ours, 20) == "".join(ours.splitlines(keepends=True)[:2])
    assert copied(ours, 9) == ""
    assert copied(ours[:-1], 30) == ours  # whole but for its newline
    assert copied(ours[:-9], 30) == copied(ours, 20)
    others = '{"loss": 1, "step": 3}\n\nno record\n{"step": 40, "loss": 1}\n{"step":5}\n[6]\n'
    assert copied(others + ours, 20) == '{"loss": 1, "step": 3}\n{"step":5}\n' + copied(ours, 20)
    assert copied("\n", 20) == ""
    with pytest.raises(ValueError, match="holds 1 lines and not one record"):
        copied("no record\n", 20)


def test_no_file_has_no_record(tmp_path: Path) -> None:
    to = io.BytesIO()
    copy_records(tmp_path / "metrics.jsonl", to, 10)
    assert (to.getvalue(), read_records(tmp_path / "metrics.jsonl")) == (b"", ([], 0))


@pytest.mark.parametrize("rows", [5_000, 20_000])
def test_no_more_than_some_lines_are_in_memory(rows: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": 0.123456789, "lr": 0.05}}\n' for i in range(rows)))
    tracemalloc.start()
    with (tmp_path / "copy").open("wb") as to:
        copy_records(path, to, rows)
    assert last_record(path, "epoch") is None
    assert sum(len(records) for records, _ in stream_records(path)) == rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000  # two times 1,024 records; all of 5,000 take 2.5 MB
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("read", [read_records, last_record])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/proc/self/mem")  # reading it fails with EIO, seeking its end with EINVAL
    with pytest.raises(OSError, match=r"'.*/metrics\.jsonl'"):
        read(path)
