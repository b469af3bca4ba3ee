"""Tests of printing: every character of the text comes out as it is, and a reader that goes away ends nothing."""

import io
import os
import sys

import pytest
from rich.console import Console

from mnclglf.runs.console import LastingConsole, say


@pytest.mark.parametrize("text", ["exp[final]", "a[/b]", "stop[now]/x", "[red]runs", ":smile:", "\\[x]", "a" * 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_printed_as_it_is(text: str, terminal: bool) -> None:
    file = io.StringIO()
    say(Console(file=file, force_terminal=terminal, width=80), text)
    assert file.getvalue() == f"{text}\n"


@pytest.mark.parametrize(
    ("encoding", "text", "printed"),
    [
        ("ascii", "93.6 \u00b1 2.4", "93.6 +- 2.4"),
        ("ascii", "runs/\u00e4", "runs/\\xe4"),
        ("latin-1", "93.6 \u00b1 2.4", "93.6 \u00b1 2.4"),
        ("utf-8", "runs/\udcff", "runs/\\udcff"),  # a name that is no UTF-8
        ("utf-8", "93.6 \u00b1 2.4", "93.6 \u00b1 2.4"),
    ],
)
def test_what_a_terminal_cannot_show_is_no_error(encoding: str, text: str, printed: str) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        say(Console(file=file, width=80), text)
        file.flush()
        assert raw.getvalue().decode(encoding) == f"{printed}\n"


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
