"""The version of the installed distribution."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """Returns the version of mnclglf as pip knows it, which setup.py alone sets."""
    try:
        return importlib.metadata.version("mnclglf")
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout that was not installed
        return "(not installed)"
