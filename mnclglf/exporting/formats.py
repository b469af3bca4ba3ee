"""The formats of an export, and those that can be written here. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

from mnclglf.config import require

Format = Literal["safetensors", "onnx", "pt2"]
NetworkName = Literal["online", "momentum"]
FORMATS: tuple[Format, ...] = get_args(Format)
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_REMEDY = "pip install 'mnclglf[export]'"


def missing_packages() -> list[str]:
    """Returns the packages that the format onnx needs and that are not installed."""
    return [name for name in ONNX_PACKAGES if find_spec(name) is None]


def choose_formats(asked: Sequence[str] | None) -> tuple[list[Format], str]:
    """Returns the formats to write, and a line that names the one that is left out; empty if none is.

    Args:
        asked: names of formats; None takes all that can be written here.

    Raises:
        UsageError: there is no format of a name, none is named, or one was asked for that cannot be written here.
    """
    asked = [asked] if isinstance(asked, str) else asked  # a text is a sequence too, of its letters
    for name in asked or ():
        require(name in FORMATS, f"format {name!r} is none of {', '.join(FORMATS)}")
    require(asked is None or len(asked) > 0, f"no format is named; give some of {', '.join(FORMATS)}")
    chosen: list[Format] = [name for name in FORMATS if asked is None or name in asked]
    missing = missing_packages()
    if "onnx" not in chosen or not missing:
        return chosen, ""
    why = f"onnx needs {', '.join(missing)}, not installed here: {ONNX_REMEDY}"
    require(asked is None, f"format {why}")
    return [name for name in chosen if name != "onnx"], f"left out: {why}"
