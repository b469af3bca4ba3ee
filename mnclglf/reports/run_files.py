"""Reads what a run directory holds, as far as it is there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from mnclglf.runs.metrics import Record, read_records

FP32_MAX = 3.4028234663852886e38


class Views(NamedTuple):
    """Some training images and what the method saw of them. V views of n images."""

    images: NDArray[np.uint8]  # [n, H, W, 3]
    views: NDArray[np.float32]  # [V, n, 3, S, S], normalised
    mean: NDArray[np.float32]  # [3]
    std: NDArray[np.float32]  # [3]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of a run directory; what is missing is None or empty."""

    folder: Path
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list[Record])
    """Lines of metrics.jsonl in the order of their steps; of lines with the same step the last."""
    unreadable_lines: int = 0
    """Lines of metrics.jsonl that are not records, other than a torn last one."""
    results: list[dict[str, Any]] | None = None
    views: Views | None = None
    nonfinite_step: int | None = None
    """Step that nonfinite.json names."""


def read_run(folder: Path) -> RunFiles:
    """Everything a report is made of.

    Raises:
        NotADirectoryError: there is no such directory.
        ValueError: a file is there but damaged; the message names it.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no directory; give the run directory that mnclglf train --out made")
    records, unreadable = read_records(folder / "metrics.jsonl")
    nonfinite = _read_object(folder / "nonfinite.json")
    step = (nonfinite or {}).get("step")
    return RunFiles(
        folder=folder,
        config=_read_object(folder / "config.json"),
        environment=_read_object(folder / "environment.json"),
        records=records,
        unreadable_lines=unreadable,
        results=_read_results(folder / "evaluation.json"),
        views=_read_views(folder / "views.npz"),
        nonfinite_step=step if isinstance(step, int) else None,
    )


def finite(value: object) -> float | None:
    """`value` as a number, or None where it is none, or not finite, or beyond fp32, in which all figures are taken."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
        return None
    return float(value)


def _read_json(path: Path) -> object:
    """What a JSON file holds; None where there is no file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # malformed JSON or UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_object(path: Path) -> dict[str, Any] | None:
    value = _read_json(path)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__} where an object belongs")
    return cast("dict[str, Any] | None", value)


def _read_results(path: Path) -> list[dict[str, Any]] | None:
    value = _read_json(path)
    if value is None:
        return None
    results = cast("list[dict[str, Any]]", value if isinstance(value, list) else [value])
    for result in results:
        if not isinstance(result, dict) or not _is_result(result):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{path} is damaged: {str(result)[:80]} is not an evaluation result")
    return results


def _is_result(value: dict[str, Any]) -> bool:
    names = all(isinstance(value.get(name), str) for name in ("protocol", "representation"))
    epoch = value.get("epoch")
    numbers = [value.get("top1"), value.get("top5"), value.get("label_share", 1.0), 0.0 if epoch is None else epoch]
    known = all(finite(number) is not None for number in numbers)
    return names and known and isinstance(value.get("settings", {}), dict)


def _read_views(path: Path) -> Views | None:
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
    except Exception as error:  # numpy and zipfile raise many kinds: all mean that the file is no use
        raise ValueError(f"{path} is damaged: {error}") from error
    n = len(views.images)
    expected = views.images.ndim == 4 and views.views.ndim == 5 and views.views.shape[1:3] == (n, 3)
    if not expected or views.mean.shape != (3,) or views.std.shape != (3,) or views.images.dtype != np.uint8:
        raise ValueError(
            f"{path} is damaged: images {views.images.shape}, views {views.views.shape}, mean {views.mean.shape} and "
            f"std {views.std.shape} are not [n, H, W, 3], [V, n, 3, S, S], [3] and [3]"
        )
    return views
