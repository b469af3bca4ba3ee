"""The folder of an export: made whole beside its place, then renamed; nothing that is not ours is replaced."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from mnclglf.config import require
from mnclglf.exporting.networks import KIND
from mnclglf.runs.files import check_writable, naming, read_object, write_json
from mnclglf.runs.locks import is_abandoned, writing_in

FACTS = "export.json"
CARD = "README.md"  # the one file that its reader completes: license, use
TEMPORARY = re.compile(r"\.export-\d+-[0-9a-f]{8}\.tmp")  # of one process


def check_place(folder: Path) -> None:
    """Raises unless an export can be put into `folder`: nothing is there, or an empty folder, or an export of ours.

    Raises:
        UsageError: something else is there, or files were added to the export, or its README.md was changed.
        OSError: nothing can be written there.
    """
    check_writable(folder.parent, "make it writable, or choose another --out")
    if not os.path.lexists(folder):
        return
    elsewhere = "choose another --out, or move it away"
    require(folder.is_dir(), f"{folder} is no folder; {elsewhere}")
    found = sorted(path.name for path in folder.iterdir())
    if not found:
        return
    files = listed(folder)
    require(files is not None, f"{folder} holds {found[0]!r} and is no export of mnclglf; {elsewhere}")
    added = [name for name in found if name != FACTS and name not in cast("dict[str, Any]", files)]
    require(not added, f"{folder} holds {', '.join(map(repr, added))} beside an export of mnclglf; {elsewhere}")
    card = folder / CARD
    if card.is_file():
        written = cast("dict[str, Any]", files)[CARD].get("sha256")
        require(
            checksum(card) == written,
            f"{card} was changed since it was exported, and would be replaced; move it away, or choose another --out",
        )


def listed(folder: Path) -> dict[str, Any] | None:
    """Returns what export.json says of each file of the export in `folder`; None if that is no export of ours."""
    try:
        facts = read_object(folder / FACTS) or {}
    except (OSError, ValueError):
        return None
    files = facts.get("files")
    if facts.get("kind") != KIND or not isinstance(files, dict):
        return None
    entries = cast("dict[str, Any]", files)
    return entries if all(isinstance(entry, dict) for entry in entries.values()) else None


def make_folder(folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> None:
    """Puts what `write` writes, and export.json, into `folder`, whole or not at all; an export there is replaced.

    Args:
        folder: an absolute path that `check_place` allows.
        write: writes files into the empty folder that it is given, and returns the content of export.json but "files".

    Raises:
        UsageError, OSError: as of `check_place`, which is asked again before anything is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(folder) as made, naming(folder):
        facts = write(made)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in sorted(made.iterdir())}
        write_json(made / FACTS, {**facts, "files": files})
        for path in made.iterdir():
            sync(path)
        with writing_in(folder.parent):
            check_place(folder)
            replace(folder, made)


@contextmanager
def temporary_beside(folder: Path) -> Generator[Path, None, None]:
    """Makes an empty folder beside `folder`, after what killed exports left was mended; removes it after an error.

    A lock on it tells other processes that this one still writes into it.
    """
    made = folder.with_name(f".export-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with ExitStack() as stack:
        with writing_in(folder.parent):
            mend(folder)
            made.mkdir()
            stack.enter_context(writing_in(made))
        try:
            yield made
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def mend(folder: Path) -> None:
    """Puts the earlier export back if a process was killed while it was replaced; removes what else it left.

    The caller holds the lock of the parent folder.
    """
    old = replaced(folder)
    if old.is_dir():
        if is_free(folder):
            old.rename(folder)
        else:
            shutil.rmtree(old)
    for left in folder.parent.glob(".export-*.tmp"):
        if TEMPORARY.fullmatch(left.name) and left.is_dir() and is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def replace(folder: Path, made: Path) -> None:
    """Renames `made` to `folder`; removes the export that was there. The caller holds the lock of the parent folder."""
    if is_free(folder):
        made.rename(folder)
        return
    old = replaced(folder)
    folder.rename(old)
    try:
        made.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def replaced(folder: Path) -> Path:
    """Returns where the earlier export in `folder` is while a new one takes its place."""
    # Not by the name itself, which may already have as many letters as a file system takes.
    return folder.with_name(f".export-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:16]}.old")


def is_free(folder: Path) -> bool:
    """Returns whether `folder` is missing or empty."""
    return not folder.exists() or not any(folder.iterdir())


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
