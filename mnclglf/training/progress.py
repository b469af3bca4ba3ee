"""Progress of a run while it trains: metrics.jsonl, the loggers and a display."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from mnclglf.runs.console import say
from mnclglf.runs.files import write_atomically
from mnclglf.runs.loggers import Loggers
from mnclglf.runs.metrics import copy_records, last_record, line_of

PLAIN_LINE_SECONDS = 10.0  # between two progress lines without a terminal, so that a log file stays short


class RunLog:
    """Writes the records of one run, continuing after `start` steps; a context manager.

    Args:
        folder: the run directory.
        start: steps already done; records of an earlier process beyond them are dropped.
        total: steps of the whole run.
        console: console for progress, a live bar on a terminal and plain lines elsewhere.
        loggers: open loggers, closed at the end.
    """

    def __init__(
        self, folder: Path, *, start: int, total: int, console: Console, loggers: Loggers | None = None
    ) -> None:
        self.path, self.start, self.total, self.console = folder / "metrics.jsonl", start, total, console
        # A killed process may have logged steps after its last checkpoint; this process takes them again.
        write_atomically(self.path, lambda file: copy_records(self.path, file, last_step=start))
        timed = last_record(self.path, "elapsed_seconds")
        self.earlier_seconds = 0.0 if timed is None else float(timed["elapsed_seconds"])
        self.started = time.perf_counter()
        self.last_line = float("-inf")
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.unwritten = b""  # lines that could not be written yet
        self.failed = False  # and this was said
        self.loggers = loggers or Loggers({}, print)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),  # takes what the others leave
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[left]} left"),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self.step_seconds: float | None = None  # of the latest record
        self.task = self.progress.add_task("starting", total=total, completed=start, left="-:--:--")

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()
        self._append(b"")
        os.close(self.descriptor)
        self.loggers.close()

    def write(self, record: dict[str, Any]) -> None:
        """Adds one record: a dict with "step", "epoch", "loss", "lr", "images_per_second" and other figures."""
        elapsed = time.perf_counter() - self.started
        step = record["step"]
        record = {**record, "elapsed_seconds": round(self.earlier_seconds + elapsed, 3)}
        self._append(line_of(record).encode())  # a killed process loses no record
        self.loggers.scalars(step, {name: value for name, value in record.items() if name != "step"})
        # Prefer the measured time of a step: the average would include minutes of compilation in the first one. During
        # the warm-up only the average is known.
        self.step_seconds = record.get("step_seconds") or elapsed / max(step - self.start, 1)
        left = self.step_seconds * (self.total - step)
        self.progress.update(self.task, description=describe_briefly(record))
        self.advance(step)
        due = elapsed - self.last_line >= PLAIN_LINE_SECONDS or step == self.total
        if not self.console.is_terminal and due:
            self.last_line = elapsed
            say(self.console, f"step {step}/{self.total}  {describe(record, left)}")

    def _append(self, line: bytes) -> None:
        """Writes a line and those that could not be written before; a disk that is full does not end a training."""
        self.unwritten += line
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self.descriptor, self.unwritten) :]
        except OSError as error:
            if not self.failed:
                text = f"{self.path} cannot be written ({error.strerror}); its lines wait in memory for another try"
                say(self.console, text, style="yellow")
            self.failed = True

    def advance(self, done: int) -> None:
        """Moves the display to the steps that are done; called after every step, it waits for nothing."""
        left = "-:--:--" if self.step_seconds is None else duration(self.step_seconds * (self.total - done))
        self.progress.update(self.task, completed=done, left=left)


def describe(record: dict[str, Any], seconds_left: float) -> str:
    """Returns one line of progress: epoch, losses, learning rate, speed, time left."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in record.items() if name.startswith("loss"))
    rate = _rate(record)
    return f"epoch {record['epoch']:.1f}  {terms}  lr {record['lr']:.4f}  {rate}{duration(seconds_left)} left"


def describe_briefly(record: dict[str, Any]) -> str:
    """Returns what stands before the bar: epoch, loss and speed, so that a terminal of 80 columns holds the line."""
    return f"epoch {record['epoch']:.1f}  loss {record['loss']:.3f}  {_rate(record)}".rstrip()


def _rate(record: dict[str, Any]) -> str:
    speed = record["images_per_second"]
    return "" if speed is None else f"{speed:,.0f} images/s  "  # None during the warm-up


def duration(seconds: float) -> str:
    """Returns seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
