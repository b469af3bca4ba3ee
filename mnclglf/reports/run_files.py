"""Reads the files of a run directory, those that exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnclglf.reports.series import Metrics, read_metrics
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.files import read_object
from mnclglf.runs.quality import load_qualities
from mnclglf.runs.results import load_results


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
    metrics: Metrics = field(default_factory=Metrics)
    """Figures of metrics.jsonl."""
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    quality: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Figures without labels, of quality.json."""
    views: Views | None = None
    gallery: Mapping[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    """Arrays of gallery.npz, see evaluation/gallery.py."""
    queue: Mapping[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    """Arrays of queue.npz, see training/queue_pictures.py."""
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
    nonfinite = read_object(folder / "nonfinite.json")
    step = (nonfinite or {}).get("step")
    return RunFiles(
        folder=folder,
        config=read_object(folder / "config.json"),
        environment=read_object(folder / "environment.json"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        results=[asdict(result) for result in load_results(folder / "evaluation.json")],
        quality=[asdict(result) for result in load_qualities(folder / "quality.json")],
        views=read_views(folder / "views.npz"),
        gallery=read_arrays(folder / "gallery.npz"),
        queue=read_arrays(folder / "queue.npz"),
        nonfinite_step=step if isinstance(step, int) else None,
    )


def read_views(path: Path) -> Views | None:
    """Reads views.npz; None if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with open_arrays(path) as file:
            views = Views(
                images=file["images"],
                views=file["views"].astype(np.float32),
                mean=file["mean"].astype(np.float32),
                std=file["std"].astype(np.float32),
            )
    except OSError:
        raise
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


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Reads a .npz file; empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with open_arrays(path) as file:
            return dict(file)
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds of errors for a damaged file
        raise ValueError(f"{path} is damaged: {error}; delete it, and evaluate again") from error
