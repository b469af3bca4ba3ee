"""Processes that are killed at every point at which they rename or remove a file of an export."""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from mnclglf.exporting.folder import CARD, make_folder
from mnclglf.exporting.networks import KIND

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}  # what the interpreter tells of, before it is done


def writer(text: str) -> Callable[[Path], dict[str, Any]]:
    """Returns a function that writes an export of two files with this text."""

    def write(made: Path) -> dict[str, Any]:
        (made / CARD).write_text(text)
        (made / "encoder.safetensors").write_text(text)
        return {"kind": KIND}

    return write


def killed_at(step: int, folder: Path, text: str) -> bool:
    """Exports in a process that is killed before its step; returns whether it was, and not done before."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] == signal.SIGKILL
    seen = count(1)

    def kill(event: str, _: object) -> None:
        if event in EVENTS and next(seen) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    make_folder(folder, writer(text))
    os._exit(0)


def broken(_: Path) -> dict[str, Any]:
    """Fails to write an export."""
    raise ValueError("broken")


def check_every_kill(root: Path) -> None:
    """Kills an export over an earlier one at each step; after the next start one of both is whole, and nothing else."""
    for step in count(1):
        folder = root / str(step) / "export"
        make_folder(folder, writer("before"))
        was_killed = killed_at(step, folder, "new")
        try:
            make_folder(folder, broken)
        except ValueError:
            assert [path.name for path in folder.parent.iterdir()] == ["export"], step
        texts = {path.read_text() for path in folder.iterdir() if path.name != "export.json"}
        assert len([*folder.iterdir()]) == 3, step
        assert texts in ({"before"}, {"new"}), step
        make_folder(folder, writer("last"))
        assert {(folder / name).read_text() for name in (CARD, "encoder.safetensors")} == {"last"}, step
        if not was_killed:
            assert step > 8  # a folder made, three renames, three files and a folder removed, at least
            assert texts == {"new"}
            return
