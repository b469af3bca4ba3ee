"""What a command is: a frozen dataclass whose fields are its arguments, and that runs itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import tyro
from rich.console import Console

from mnclglf.config import Device

Run = Annotated[Path, tyro.conf.Positional]
Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]


class Command(Protocol):
    """A command of the command line. Its docstring and those of its fields are its help."""

    def check(self) -> None:
        """Raises ValueError for arguments that do not fit each other, before any file is read."""
        ...

    def execute(self, console: Console) -> int:
        """Runs the command; returns the exit code."""
        ...


@runtime_checkable
class Shared(Protocol):
    """A command whose work the ranks that torchrun started share. Rank 0 does all the work of other commands."""

    @property
    def shared_device(self) -> Device:
        """Returns the device of each rank, as --device names it."""
        ...
