"""Printing to the console."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints text as it is: a path or a log may contain brackets and :words:, which rich would interpret."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
