"""Tests of the console: text of a user is not markup, and a reader that goes away ends nothing."""

import os
import sys
from pathlib import Path

import pytest

from mnclglf.runs.console import LastingConsole, say


def test_a_reader_that_goes_away_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        console = LastingConsole(file=file)
        say(console, "read")
        os.close(reading)
        for _ in range(3):
            say(console, "x" * 100_000)  # more than any buffer holds
    assert capsys.readouterr().err.count("going on without it") == 1


def test_a_reader_of_both_outputs_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file, os.fdopen(os.dup(file.fileno()), "w", buffering=1) as errors:
        monkeypatch.setattr(sys, "stderr", errors)
        say(LastingConsole(file=file), "x")
        monkeypatch.undo()
        os.dup2(file.fileno(), errors.fileno())  # so that closing it does not fail in this test


def test_brackets_are_no_markup(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        say(LastingConsole(file=file), "runs/exp[final] a[/b]")
    assert (tmp_path / "out").read_text() == "runs/exp[final] a[/b]\n"
