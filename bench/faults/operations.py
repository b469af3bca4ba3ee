"""The operations of a command on files, before each of which it can be killed or fail.

Python tells an audit hook of files that are opened, renamed or removed; fsync and write are wrapped here. What a
library in another language opens is not seen until Python touches it.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
"""Audit events of changes, and which of their arguments names the file."""
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
Act = Callable[[str, str, Path], None]
"""What is done before an operation: its kind, the name of its file as text, and the file."""


def watch(folder: Path, act: Act) -> None:
    """Calls `act` before each operation of this process on a file in `folder`, from now on and forever."""

    def at(kind: str, path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            whole = Path(os.fsdecode(path)).absolute()
            if whole.is_relative_to(folder):
                act(kind, name_of(str(whole.relative_to(folder))), whole)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            at("open" if (flags or 0) & CHANGES else "read", path)
        elif event in EVENTS:
            at(event.removeprefix("os."), arguments[EVENTS[event]])

    fsync, write = os.fsync, os.write

    def watched_fsync(file: Any) -> None:
        at("fsync", path_of(file if isinstance(file, int) else file.fileno()))
        fsync(file)

    def watched_write(descriptor: int, data: Any) -> int:
        at("write", path_of(descriptor))
        return write(descriptor, data)

    os.fsync, os.write = watched_fsync, watched_write
    sys.addaudithook(hear)


def path_of(descriptor: int) -> str:
    """Returns the path of an open file."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def name_of(path: str) -> str:
    """Returns the name of a file without what differs from run to run."""
    path = re.sub(r"\.([^/]+)\.\d+-[0-9a-f]{8}\.tmp", r"\1 (temporary)", path)
    path = re.sub(r"\.export-\d+-[0-9a-f]{8}\.tmp", "export (temporary)", path)
    path = re.sub(r"\.export-[0-9a-f]{16}\.old", "export (earlier)", path)
    path = re.sub(r"[0-9a-f]{32}-[0-9a-f]{32}", "parquet", path)
    return re.sub(r"step-\d+\.pt", "step-N.pt", path)


def list_operations(folder: Path, listed: Path) -> None:
    """Writes the name of each operation on a file in `folder` into `listed`, one per line."""
    file = listed.open("a")

    def act(kind: str, name: str, path: Path) -> None:
        file.write(f"{kind} {name}\n")
        file.flush()

    watch(folder, act)


def kill_before(folder: Path, operation: str, number: int) -> None:
    """Kills this process before the `number`-th time, from 1, of an operation as `list_operations` names it."""
    left = number

    def act(kind: str, name: str, path: Path) -> None:
        nonlocal left
        if f"{kind} {name}" == operation:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, act)


def kill_within_a_write(size: int) -> None:
    """Lets the system kill this process as it writes beyond so many bytes of any file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def fail(folder: Path, operation: str, error: int) -> None:
    """Lets an operation fail with an error number, each time; "write FILE" names one file, "open" those of all."""

    def act(kind: str, name: str, path: Path) -> None:
        if operation in (kind, f"{kind} {name}"):
            # Of a descriptor the system, and so Python, knows no name.
            told = [] if kind in ("fsync", "write") else [str(path)]
            raise OSError(error, os.strerror(error), *told)

    watch(folder, act)
