"""What a file system knows of a file, by which a replaced file is seen."""

from __future__ import annotations

import os
from typing import NamedTuple


class Stamp(NamedTuple):
    """What a file system knows of a file; that of a replaced file differs, even at the same size and time."""

    size: int = 0
    modified: int = 0
    changed: int = 0
    """Time of the last change of contents or attributes, which no program can set."""
    inode: int = 0

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Returns the stamp of a file with this status."""
        # An inode has 64 bits without a sign; files of ours hold signed numbers.
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1))
