"""Printing to the console."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints text as it is: a path or a log may contain brackets and :words:, which rich would interpret.

    A character that the terminal's encoding lacks is printed as its code, and the plus-minus sign as +-.
    """
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.replace("\u00b1", "+-").encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
