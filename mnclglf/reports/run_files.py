"""Reads the files of a run directory, those that exist."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnclglf.runs.files import read_object
from mnclglf.runs.metrics import Record, read_records
from mnclglf.runs.results import load_results

FP32_MAX = 3.4028234663852886e38


class Views(NamedTuple):
    """Some training images and their views. V views of n images."""

    images: NDArray[np.uint8]  # [n, H, W, 3]
    views: NDArray[np.float32]  # [V, n, 3, S, S], normalized
    mean: NDArray[np.float32]  # [3]
    std: NDArray[np.float32]  # [3]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Contents of a run directory; a missing file is None or empty."""

    folder: Path
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list[Record])
    """Lines of metrics.jsonl in the order of their steps; the last one of each step."""
    unreadable_lines: int = 0
    """Number of lines of metrics.jsonl that are not records, without a torn last one."""
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    views: Views | None = None
    nonfinite_step: int | None = None
    """The step that nonfinite.json names."""


def read_run(folder: Path) -> RunFiles:
    """Reads everything that a report needs.

    Raises:
        NotADirectoryError: there is no such directory.
        ValueError: a file is there but damaged; the message names it.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no directory; give the run directory that mnclglf train --out made")
    records, unreadable = read_records(folder / "metrics.jsonl")
    nonfinite = read_object(folder / "nonfinite.json")
    step = (nonfinite or {}).get("step")
    return RunFiles(
        folder=folder,
        config=read_object(folder / "config.json"),
        environment=read_object(folder / "environment.json"),
        records=records,
        unreadable_lines=unreadable,
        results=[asdict(result) for result in load_results(folder / "evaluation.json")],
        views=read_views(folder / "views.npz"),
        nonfinite_step=step if isinstance(step, int) else None,
    )


def finite(value: object) -> float | None:
    """Returns `value` as a number; None if it is no number, not finite, or beyond fp32, the dtype of the figures."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
        return None
    return float(value)


def read_views(path: Path) -> Views | None:
    """Reads views.npz; None if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            views = Views(
                images=file["images"],
                views=file["views"].astype(np.float32),
                mean=file["mean"].astype(np.float32),
                std=file["std"].astype(np.float32),
            )
    except Exception as error:  # numpy and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"{path} is damaged: {error}") from error
    n = len(views.images)
    expected = views.images.ndim == 4 and views.views.ndim == 5 and views.views.shape[1:3] == (n, 3)
    if not expected or views.mean.shape != (3,) or views.std.shape != (3,) or views.images.dtype != np.uint8:
        raise ValueError(
            f"{path} is damaged: images {views.images.shape}, views {views.views.shape}, mean {views.mean.shape} and "
            f"std {views.std.shape} are not [n, H, W, 3], [V, n, 3, S, S], [3] and [3]"
        )
    return views
