"""A digest of the sources: what was tested or measured holds for these files and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def digest(root: Path = ROOT, parts: Sequence[str] = ("mnclglf", "kernels", "tests")) -> str:
    """Returns a digest of the names and contents of the Python files in these folders, and of bench/reference.py."""
    sources = {path for part in parts for path in (root / part).rglob("*.py")}
    sources |= set((root / "bench").glob("reference.py"))
    found = hashlib.sha256()
    for path in sorted(sources):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
