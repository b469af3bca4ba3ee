"""Patterns of files, as shards:PATTERN takes them, and splits by the names of files."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnclglf.config import is_remote, require, shown, shown_in
from mnclglf.data.errors import DataError
from mnclglf.data.ranges import file_system
from mnclglf.data.sources.layout import few, split_of

logger = logging.getLogger(__name__)

MOST_FILES = 2**20  # of a pattern
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_files(pattern: str, suffix: str) -> tuple[list[str], list[str]]:
    """Returns the files of the training images, and those of the images to test on, each in the order of their names.

    Args:
        pattern: a folder, whose files may name a split; else a file, a glob or a range in braces: then all are for
            training.
        suffix: end of the files' names.

    Raises:
        DataError: there is no file, or the names give test images and no train.
        UsageError: the pattern is none.
    """
    remote = is_remote(pattern)
    folder = _folder_files(pattern, suffix, remote=remote)
    if folder is not None:
        return split_files(folder, shown(pattern))
    files = [file for part in expand_braces(pattern) for file in _matches(part, remote=remote)]
    # What a server is asked after the ? is kept nowhere, so it tells no files apart.
    twice = next((a for a, b in itertools.pairwise(sorted(map(shown, files))) if a == b), None)
    if twice is not None:
        copy = ", and copy files here that differ only after the ? of their address" if remote else ""
        raise DataError(f"{shown(pattern)} names {twice} twice; give each file once{copy}")
    if not files:
        raise DataError(
            f"{shown(pattern)}: there is no such file; give a folder of {suffix} files, or a pattern of some"
        )
    return sorted(files), []


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern stands for, as bash has them: {0000..0009} is a range, {a,b} a choice.

    Raises:
        UsageError: a brace is not closed, or holds neither; or there are too many names.
    """
    start = pattern.find("{")
    if start < 0:
        require("}" not in pattern, f"pattern {shown(pattern)!r} closes a brace that it does not open")
        return [pattern]
    depth, end = 0, start
    commas = [start]
    for end in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[end], 0)
        if depth == 1 and pattern[end] == ",":
            commas.append(end)
        if depth == 0:
            break
    require(depth == 0, f"pattern {shown(pattern)!r} does not close its brace; give {{0000..0009}} or {{a,b}}")
    inside = pattern[start + 1 : end]
    span = _RANGE.fullmatch(inside)
    if span:
        choices = _numbers(span[1], span[2])
    else:
        require(
            len(commas) > 1,
            f"pattern {shown(pattern)!r}: {{{inside}}} is neither a range, {{0000..0009}}, nor a choice, {{a,b}}",
        )
        bounds = [*commas, end]
        choices = [made for a, b in itertools.pairwise(bounds) for made in expand_braces(pattern[a + 1 : b])]
    rest = expand_braces(pattern[end + 1 :])
    require(
        len(choices) * len(rest) <= MOST_FILES,
        f"pattern {shown(pattern)!r} stands for more than {MOST_FILES:,} files; give fewer",
    )
    return [f"{pattern[:start]}{choice}{after}" for choice in choices for after in rest]


def _numbers(first: str, last: str) -> list[str]:
    """Returns the numbers of a range, up or down, with as many zeros before as the longer end if an end has some."""
    a, b = int(first), int(last)
    require(abs(a - b) < MOST_FILES, f"{{{first}..{last}}} are more than {MOST_FILES:,} files")
    padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}}" for number in (range(a, b + 1) if a <= b else range(a, b - 1, -1))]


def split_files(files: Sequence[str], place: str) -> tuple[list[str], list[str]]:
    """Returns the files of the training images, and those of the images to test on, by the words in their names.

    Raises:
        DataError: some files are of no part, there is no train, or a name has several parts.
    """
    parts: dict[str | None, list[str]] = {}
    for file in files:
        parts.setdefault(part_of(file, place), []).append(file)
    if not parts.keys() - {None}:
        return list(files), []
    beside = parts.pop(None, [])
    if beside:
        raise DataError(
            f"{place} holds {few([_last(file) for file in beside])} beside files of a split, "
            f"{few([_last(files[0]) for files in parts.values()])}; move them away, or give a pattern of the files to "
            "train on"
        )
    if "train" not in parts:
        raise DataError(
            f"{place} holds {few([_last(files[0]) for files in parts.values()])} and no train; give a pattern of the "
            "files to train on"
        )
    tests = [name for name in ("val", "test") if name in parts]
    if len(tests) == 2:
        logger.warning("%s has val and test: evaluating on val", place)
    return parts["train"], parts[tests[0]] if tests else []


def part_of(file: str, place: str) -> str | None:
    """Returns train, val or test if a word in the name of a file, or of its folder in `place`, is a spelling of it.

    Raises:
        DataError: there are words of several parts.
    """
    inside = file.removeprefix(place).strip("/")
    words = [word for name in inside.split("/") for word in re.split(r"[-_.\s]+", name)]
    found = sorted({part for part in map(split_of, words) if part})
    if len(found) > 1:
        raise DataError(f"{file}: the name is of {' and '.join(found)}; give a pattern of the files to train on")
    return found[0] if found else None


def _folder_files(pattern: str, suffix: str, *, remote: bool) -> list[str] | None:
    """Returns the files of a folder, or else of the folders in it, in the order of their names; None if it is none."""
    if remote:
        if pattern.startswith("http") or pattern.endswith(suffix) or set("{*") & set(pattern):
            return None  # a server of http has no folders
        found = [*_remote(pattern, f"{pattern.rstrip('/')}/*{suffix}")]
        found = found or [*_remote(pattern, f"{pattern.rstrip('/')}/*/*{suffix}")]
    else:
        folder = Path(pattern).expanduser()
        if not folder.is_dir():
            return None
        found = _visible(folder.glob(f"*{suffix}")) or _visible(folder.glob(f"*/*{suffix}"))
    if not found:
        raise DataError(f"{shown(pattern)} holds no {suffix} file; give a folder that does, or a pattern of files")
    return sorted(found)


def _visible(paths: Any) -> list[str]:
    return [str(path) for path in paths if not any(part.startswith(".") for part in path.parts[-2:]) and path.is_file()]


def _matches(pattern: str, *, remote: bool) -> list[str]:
    """Returns the files of a pattern without braces; one without a star need not exist."""
    if remote:
        if "*" not in pattern:
            return [pattern]
        require(
            not pattern.startswith("http"),
            f"pattern {shown(pattern)!r}: a server of http does not list its files; give a range, as {{0000..0009}}",
        )
        return _remote(pattern, pattern)
    path = os.path.expanduser(pattern)
    if not glob.has_magic(path) or os.path.exists(path):
        return [path]
    return [found for found in glob.glob(path) if os.path.isfile(found)]


def _remote(place: str, pattern: str) -> list[str]:
    """Returns the addresses that a glob finds.

    Raises:
        DataError: the server cannot be asked.
    """
    system, scheme = file_system(place), place.partition("://")[0]
    try:
        return [f"{scheme}://{found}" for found in system.glob(pattern)]
    except Exception as error:  # of any library that speaks with the server
        raise DataError(
            f"{shown(place)} cannot be listed ({type(error).__name__}: {shown_in(str(error))}); check the place"
        ) from error


def _last(file: str) -> str:
    return file.rpartition("/")[2]
