"""Error for data sets whose files are missing, damaged or unexpected."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Error: the files of a data set are missing, damaged or unexpected."""


def damaged(path: Path, problem: str) -> DataError:
    """Returns an error that names `path`, its problem and the remedy."""
    return DataError(f"{path}: {problem}; delete it and fetch it again (--download, or by hand into --data-dir)")
