"""The launch configurations: one table by (kernel family, dtype, width, architecture), which a tuning file overrules.

Every entry compiles without spills and within the shared memory of its architecture (tests/kernels/test_tiles.py). None
was chosen by timings on a GPU: `python -m mnclglf_kernels.tune` does that and writes the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mnclglf_kernels._triton.launch import Launch

ARCHITECTURES = (80, 86, 89, 90)
WIDTHS = (128, 512, 65536)  # upper ends of the width buckets


@dataclass(frozen=True)
class Tile:
    """What one program of a matmul kernel makes.

    Attributes:
        rows, columns: of the output tile.
        depth: how much of the summed dimension is loaded at a time.
        warps: of 32 threads.
        stages: loads in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# A tile takes about (stages - 1) * (rows + columns) * depth * bytes of shared memory: sm_86 and sm_89 have 99 KiB a
# block and 100 an SM, sm_80 163 and 164, sm_90 227 and 228. These let two programs or more share an SM. fp32 multiplies
# without tensor cores (input_precision "ieee"), so registers set its tile.
SMALL = {arch: Tile(64, 64, 32, 4, 3) for arch in ARCHITECTURES}
WIDE = {arch: Tile(64, 128, 32, 4, 3) for arch in ARCHITECTURES}
LARGE = {
    80: Tile(128, 128, 64, 4, 3),
    86: Tile(128, 128, 32, 4, 3),
    89: Tile(128, 128, 32, 4, 3),
    90: Tile(128, 128, 64, 4, 3),
}
DEEP = {
    80: Tile(64, 128, 64, 4, 3),
    86: Tile(64, 128, 32, 4, 4),
    89: Tile(64, 128, 32, 4, 4),
    90: Tile(64, 128, 64, 4, 4),
}
FP32 = {arch: Tile(64, 64, 32, 4, 2) for arch in ARCHITECTURES}
FP32_GRADIENT = {arch: Tile(64, 64, 16, 8 if arch == 90 else 4, 2) for arch in ARCHITECTURES}

Entries = tuple[dict[int, Tile], dict[int, Tile], dict[int, Tile]]  # one for each bucket of widths
TABLE: dict[tuple[str, Literal["half", "fp32"]], Entries] = {}


def register(family: str, *, half: Entries, fp32: Entries) -> None:
    """Adds a kernel family to the table, which is done by the operator that has its kernels."""
    TABLE[family, "half"], TABLE[family, "fp32"] = half, fp32


class Tuning(NamedTuple):
    """A kernel family to measure: its launches with a given tile, and the tensors that they write."""

    family: str
    launches: Callable[[Tile], list[Launch]]
    results: list[Tensor]


def tile(family: str, dtype: torch.dtype, width: int, arch: int) -> Tile:
    """Returns the configuration of a kernel family: the tuning file's where it has one for this GPU, else the table's.

    Args:
        family: as registered.
        dtype: of what is multiplied.
        width: D.
        arch: 86 for sm_86; one that the table does not know takes the entry of the nearest one below it.
    """
    tuned = read_tuning(tuning_path()).get(key(family, dtype, width, arch))
    return tuned or TABLE[family, kind(dtype)][bucket(width)][nearest_architecture(arch)]


def nearest_architecture(arch: int) -> int:
    """The newest architecture of the table that is not newer than `arch`; the oldest where there is none."""
    return max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])


def kind(dtype: torch.dtype) -> Literal["half", "fp32"]:
    return "fp32" if dtype == torch.float32 else "half"


def bucket(width: int) -> int:
    """Position in WIDTHS of the bucket that a width is in; what is wider than all is in the last."""
    return next((i for i, end in enumerate(WIDTHS[:-1]) if width <= end), len(WIDTHS) - 1)


def key(family: str, dtype: torch.dtype, width: int, arch: int) -> str:
    """Name of an entry in the tuning file, such as neighbor/half/D65536/sm_86."""
    return f"{family}/{kind(dtype)}/D{WIDTHS[bucket(width)]}/sm_{arch}"


def tuning_path() -> Path:
    """Where the tuning file is: MNCLGLF_TUNING, else in the user's cache folder."""
    if chosen := os.environ.get("MNCLGLF_TUNING"):
        return Path(chosen)
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # stays "~/..." without a home
    return Path(cache_home) / "mnclglf" / "tuning.json"


@cache
def read_tuning(path: Path) -> dict[str, Tile]:
    """The entries of a tuning file; none where there is no file.

    Raises:
        ValueError: the file is not one that `tune` wrote.
    """
    if not path.exists():
        return {}
    try:
        found = {name: Tile(**entry) for name, entry in json.loads(path.read_text())["tiles"].items()}
        for name, t in found.items():
            check_tile(name, t)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no tuning file ({error}); delete it, or write it anew with python -m mnclglf_kernels.tune"
        ) from error


def check_tile(name: str, t: Tile) -> None:
    """ValueError unless Triton could make such a tile."""
    if not all(type(value) is int and value > 0 for value in asdict(t).values()):
        raise ValueError(f"{name} has {t}, whose numbers must be whole and positive")
    if any(side < 16 or side & (side - 1) for side in (t.rows, t.columns, t.depth)) or t.warps & (t.warps - 1):
        raise ValueError(f"{name} has {t}, whose sides must be powers of two from 16 on, and its warps a power of two")


def write_tuning(path: Path, tiles: dict[str, Tile]) -> None:
    """Writes a tuning file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    text = json.dumps({"tiles": {name: asdict(entry) for name, entry in tiles.items()}}, indent=1) + "\n"
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    read_tuning.cache_clear()
