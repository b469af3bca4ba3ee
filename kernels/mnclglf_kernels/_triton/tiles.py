"""Launch configurations: one table by (kernel family, dtype, width, architecture). A tuning file overrides it.

Every entry compiles without spills and within the shared memory of its architecture (tests/kernels/test_tiles.py). No
entry was chosen by timings on a GPU. `python -m mnclglf_kernels.tune` takes such timings and writes the tuning file.
"""

from __future__ import annotations

import json
import os
import tempfile
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
    """Launch configuration of a matmul kernel: the output tile of one program, and its warps and stages.

    Attributes:
        rows, columns: sides of the output tile.
        depth: elements of the summed dimension that are loaded at a time.
        warps: number of warps (of 32 threads) per program.
        stages: number of stages of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# A tile takes about (stages - 1) * (rows + columns) * depth * itemsize bytes of shared memory. sm_86 and sm_89 have
# 99 KiB per block and 100 KiB per SM, sm_80 has 163 and 164, sm_90 has 227 and 228. With these tiles at least two
# programs share an SM. fp32 is multiplied without tensor cores (input_precision "ieee"), so registers limit its tile.
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

Entries = tuple[dict[int, Tile], dict[int, Tile], dict[int, Tile]]  # one table per width bucket
TABLE: dict[tuple[str, Literal["half", "fp32"]], Entries] = {}


def register(family: str, *, half: Entries, fp32: Entries) -> None:
    """Adds a kernel family to the table. The module with the family's kernels calls it."""
    TABLE[family, "half"], TABLE[family, "fp32"] = half, fp32


class Tuning(NamedTuple):
    """Kernel family to measure: its launches for a given tile, the tensors that they write, its width if not D."""

    family: str
    launches: Callable[[Tile], list[Launch]]
    results: list[Tensor]
    width: int | None = None


def tile(family: str, dtype: torch.dtype, width: int, arch: int) -> Tile:
    """Returns the configuration of a kernel family: the tuning file's if it has one for this GPU, else the table's.

    Args:
        family: name under which the family is registered.
        dtype: dtype of the multiplied rows.
        width: D.
        arch: compute capability, 86 for sm_86. An unknown one takes the entry of the nearest one below it.
    """
    tuned = read_tuning(tuning_path()).get(key(family, dtype, width, arch))
    return tuned or TABLE[family, kind(dtype)][bucket(width)][nearest_architecture(arch)]


def nearest_architecture(arch: int) -> int:
    """Returns the newest architecture of the table that is not newer than `arch`, or else the oldest one."""
    return max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])


def kind(dtype: torch.dtype) -> Literal["half", "fp32"]:
    return "fp32" if dtype == torch.float32 else "half"


def bucket(width: int) -> int:
    """Returns the position of a width's bucket in WIDTHS. The last bucket takes everything wider too."""
    return next((i for i, end in enumerate(WIDTHS[:-1]) if width <= end), len(WIDTHS) - 1)


def key(family: str, dtype: torch.dtype, width: int, arch: int) -> str:
    """Returns the name of an entry in the tuning file, such as neighbor/half/D65536/sm_86."""
    return f"{family}/{kind(dtype)}/D{WIDTHS[bucket(width)]}/sm_{arch}"


def tuning_path() -> Path:
    """Returns the path of the tuning file: MNCLGLF_TUNING, or else a file in the user's cache folder.

    That folder is mnclglf's (cache_folder in mnclglf/runs/files.py, which cannot be imported from here): without a home
    that can be written it is mnclglf-<user number> in the temporary folder.
    """
    if chosen := os.environ.get("MNCLGLF_TUNING"):
        return Path(chosen)
    home = os.path.expanduser("~")  # "~" as is without HOME and an entry in passwd
    usual = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache") / "mnclglf"
    if not os.environ.get("XDG_CACHE_HOME") and (home == "~" or not _usable(usual)):
        usual = Path(tempfile.gettempdir()) / f"mnclglf-{os.getuid()}"
    return usual / "tuning.json"


def _usable(folder: Path) -> bool:
    """Returns whether the folder is there, or can be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return nearest == folder or os.access(nearest, os.W_OK | os.X_OK)


@cache
def read_tuning(path: Path) -> dict[str, Tile]:
    """Returns the entries of a tuning file, none if the file does not exist.

    Raises:
        ValueError: `tune` did not write this file.
    """
    if not os.path.exists(path):  # unlike Path.exists, False for a folder that this user may not search
        return {}
    try:
        found = {name: Tile(**entry) for name, entry in json.loads(path.read_text())["tiles"].items()}
        for name, t in found.items():
            check_tile(name, t)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no tuning file ({error}); delete it, or rewrite it with python -m mnclglf_kernels.tune"
        ) from error


def check_tile(name: str, t: Tile) -> None:
    """Raises ValueError unless Triton can compile such a tile."""
    if not all(type(value) is int and value > 0 for value in asdict(t).values()):
        raise ValueError(f"{name} has {t}, whose values must be positive integers")
    if any(side < 16 or side & (side - 1) for side in (t.rows, t.columns, t.depth)) or t.warps & (t.warps - 1):
        raise ValueError(
            f"{name} has {t}, whose sides must be powers of two of at least 16, and its warps a power of two"
        )


def write_tuning(path: Path, tiles: dict[str, Tile]) -> None:
    """Writes a tuning file atomically: a rename replaces the old one."""
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
