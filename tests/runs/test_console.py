"""Tests of printing: every character of the text comes out as it is."""

import io

import pytest
from rich.console import Console

from mnclglf.runs.console import say


@pytest.mark.parametrize("text", ["exp[final]", "a[/b]", "stop[now]/x", "[red]runs", ":smile:", "\\[x]", "a" * 200])
@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_printed_as_it_is(text: str, terminal: bool) -> None:
    file = io.StringIO()
    say(Console(file=file, force_terminal=terminal, width=80), text)
    assert file.getvalue() == f"{text}\n"
