"""The error of a data set whose files are missing, damaged or not what they should be."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A data set's files are missing, damaged or not what they should be."""


def damaged(path: Path, problem: str) -> DataError:
    """Returns an error that says what is wrong with `path` and what to do."""
    return DataError(f"{path}: {problem}; delete it and fetch it again (--download, or by hand into --data-dir)")
