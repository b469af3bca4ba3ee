"""The one way to print."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints text as it is: a path or a log may hold what rich takes for markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
