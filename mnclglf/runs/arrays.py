"""Reading of .npz files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnclglf.runs.files import naming, open_file

MOST_TIMES, ROOM = 100, 2**26
"""Arrays may take so many times the bytes of their file, and so many bytes beside that: equal pixels compress well."""


@contextmanager
def open_arrays(path: Path) -> Generator[Mapping[str, NDArray[Any]]]:
    """Opens a .npz file; each array is read as it is asked for. Nothing in it is run.

    Raises:
        OSError: the file cannot be read; the error names it.
        ValueError: it is no .npz file, or its arrays would take far more memory than its size.
        Exception: whatever numpy and zipfile raise for a damaged file, also as an array is read.
    """
    with naming(path), open_file(path) as opened:
        if opened.read(2) != b"PK":  # numpy would speak of pickles, and how to load them
            raise ValueError("it is no .npz file")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as arrays:
            size = os.fstat(opened.fileno()).st_size
            told = sum(member.file_size for member in arrays.zip.infolist())
            if told > MOST_TIMES * size + ROOM:
                raise ValueError(f"its arrays take {told:,} bytes, far more than the {size:,} of the file")
            yield arrays
