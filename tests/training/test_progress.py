"""Tests of the display of a run's progress."""

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mnclglf.runs.metrics import read_records
from mnclglf.training import progress
from mnclglf.training.progress import RunLog, duration

TOTAL = 156_000
RECORD: dict[str, Any] = dict(
    step=123_456, epoch=158.3, loss=12.345, loss_s=1.5, loss_m=1.8, lr=0.0123, images_per_second=115_783.2,
    step_seconds=1.25,
)  # fmt: skip


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def display(log: RunLog, width: int) -> str:
    """Returns what the display shows now, on a terminal of its own."""
    console = terminal(width)
    with console.capture() as captured:
        console.print(log.progress.get_renderable())
    return captured.get()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_every_column_is_there_at_every_step(width: int, tmp_path: Path) -> None:
    with RunLog(tmp_path, start=0, total=TOTAL, console=terminal(width)) as log:
        first = display(log, width)
        for text in ("starting", f"0/{TOTAL}", "-:--:-- left"):
            assert text in first
        log.write(RECORD)
        log.advance(RECORD["step"] + 3)  # the steps between two records
        shown = display(log, width)
    assert len(shown.splitlines()) == 1
    assert len(shown.rstrip("\n")) <= width
    left = duration(1.25 * (TOTAL - RECORD["step"] - 3))
    assert left == "11:17:56"
    for text in ("epoch 158.3", "loss 12.345", "115,783 images/s", "\u2501" * 6, f"123459/{TOTAL}", f"{left} left"):
        assert text in shown


def test_the_display_does_not_parse_markup(tmp_path: Path) -> None:
    with RunLog(tmp_path, start=0, total=TOTAL, console=terminal(80)) as log:
        log.progress.update(log.task, description="[/b] :smile:")
        assert "[/b] :smile:" in display(log, 80)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (3 * 86400 + 5, "72:00:05")]
)
def test_a_duration_is_in_hours(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_disk_that_is_full_for_a_while_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [40]

    def some(descriptor: int, data: bytes) -> int:
        """Writes into 40 bytes that are left."""
        taken = min(room[0], len(data))
        room[0] -= taken
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:taken])

    console = terminal(200)
    monkeypatch.setattr(progress.os, "write", some)
    with RunLog(tmp_path, start=0, total=TOTAL, console=console) as log:
        for step in (1, 2, 3):
            log.write({**RECORD, "step": step})
        room[0] = 10**6
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3]
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("metrics.jsonl cannot be written (No space left on device)") == 1
