"""Printing to the console."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from rich.console import Console


class LastingConsole(Console):
    """A console whose reader may go away, as in `mnclglf train ... | head -1`; rich's own ends the process then."""

    def on_broken_pipe(self) -> None:
        """Stops printing, and says so on stderr; whoever prints goes on."""
        self.quiet = True
        # What Python still holds of the output is written at its end, and must not fail there.
        with suppress(OSError, ValueError):  # a stream without a file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.file.fileno())
            os.close(null)
        with suppress(OSError, ValueError):
            sys.stderr.write("mnclglf: nothing reads the output any more; going on without it\n")
            sys.stderr.flush()


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints text as it is: a path or a log may contain brackets and :words:, which rich would interpret.

    A character that the terminal's encoding lacks is printed as its code, and the plus-minus sign as +-.
    """
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.replace("\u00b1", "+-").encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
