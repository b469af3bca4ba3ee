"""Files that are whole or absent. Imports nothing of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where what can be made again is kept: <XDG_CACHE_HOME or ~/.cache>/mnclglf."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnclglf"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Makes `path` hold what `write` writes, or leaves it as it was: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
