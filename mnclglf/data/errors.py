"""Error for data sets whose files are missing, damaged or unexpected."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Error: the files of a data set are missing, damaged or unexpected."""


class UnreachableError(DataError):
    """Error: files cannot be read now, as where a server or a disk fails. This says nothing about their contents."""


def unreadable(path: Path, error: BaseException) -> DataError:
    """Returns an error for a file that raised `error` when it was read: fetch it again, or make it readable."""
    if isinstance(error, PermissionError):
        return DataError(f"{path}: cannot be read ({error}); make it readable for this user, e.g. chmod -R u+rX")
    return damaged(path, f"cannot be read ({error})")


def damaged(path: Path, problem: str) -> DataError:
    """Returns an error that names `path`, its problem and the remedy."""
    return DataError(f"{path}: {problem}; delete it and fetch it again (--download, or by hand into --data-dir)")
