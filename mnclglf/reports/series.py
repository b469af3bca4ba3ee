"""Figures of metrics.jsonl as arrays, one series per key, and what of a long one is drawn. R records."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mnclglf.runs.metrics import Record, stream_records

FP32_MAX = 3.4028234663852886e38
DRAWN_POINTS = 4000  # of a curve at most; a panel is 500 pixels wide


class Series(NamedTuple):
    """Steps at which one figure was logged, in order, and its values."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


EMPTY = Series(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Every figure that a run logged; 8 bytes per figure."""

    steps: NDArray[np.int64] = field(default_factory=lambda: EMPTY.steps)  # [R]
    """Steps of the records, in order, each once."""
    series: Mapping[str, Series] = field(default_factory=dict[str, Series])
    """By key, the values that are finite numbers; a key that never has one has an empty series."""
    unreadable_lines: int = 0
    """Number of lines that are not records, without a torn last one."""

    def of(self, key: str) -> Series:
        """Returns the series of a key, empty if it was not logged."""
        return self.series.get(key, EMPTY)

    def at_the_end(self, key: str) -> float | None:
        """Returns a figure of the last record; None if it lacks it."""
        steps, values = self.of(key)
        return float(values[-1]) if len(steps) and steps[-1] == self.steps[-1] else None

    def thinned(self) -> Metrics:
        """Returns the same with thinned series."""
        return replace(self, series={key: thin(series) for key, series in self.series.items()})


def finite(value: object) -> float | None:
    """Returns `value` as a number; None if it is no number, not finite, or beyond fp32, the dtype of the figures."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
        return None
    return float(value)


def read_metrics(path: Path) -> Metrics:
    """Reads a metrics.jsonl in one pass; empty if there is none. Of a step that came twice the later record counts.

    Raises:
        OSError, ValueError: the file cannot be read, or holds lines but no record.
    """
    return collect(stream_records(path))


def collect(parts: Iterable[tuple[list[Record], int]]) -> Metrics:
    """Returns the series of records that come in parts, each with a number of lines that are none."""
    steps, columns, unreadable = array("q"), dict[str, _Column](), 0
    for records, lost in parts:
        unreadable += lost
        for key, values in _table(records).items():
            columns.setdefault(key, _Column()).add(len(steps), values)
        steps.extend(record["step"] for record in records)
    of_rows = np.frombuffer(steps, np.int64)
    if (np.diff(of_rows) > 0).all():
        series = {key: Series(of_rows[column.rows()], column.values()) for key, column in columns.items()}
        return Metrics(steps=of_rows, series=series, unreadable_lines=unreadable)
    return _sorted(of_rows, columns, unreadable)


def _sorted(of_rows: NDArray[np.int64], columns: Mapping[str, _Column], unreadable: int) -> Metrics:
    """Returns the series of rows that are not in the order of their steps, of each step the last row."""
    steps, from_the_end = np.unique(of_rows[::-1], return_index=True)
    kept = np.zeros(len(of_rows), bool)
    kept[len(of_rows) - 1 - from_the_end] = True
    series: dict[str, Series] = {}
    for key, column in columns.items():
        rows = np.arange(len(of_rows))[column.rows()]
        own, values = of_rows[rows][kept[rows]], column.values()[kept[rows]]
        order = np.argsort(own)
        series[key] = Series(own[order], values[order])
    return Metrics(steps=steps, series=series, unreadable_lines=unreadable)


def thin(series: Series, most: int = DRAWN_POINTS) -> Series:
    """Returns at most so many points of a series, all of them if they are no more.

    These are the first, the last, and the lowest and the highest one of each of equally long pieces, so that the curve
    looks like that of all points.
    """
    steps, values = series
    n = len(steps)
    if n <= most:
        return series
    length = -(-n // (most // 2 - 1))  # points of a piece
    pieces = np.pad(values, (0, -n % length), mode="edge").reshape(-1, length)
    starts = length * np.arange(len(pieces))
    kept = np.concatenate([[0], starts + pieces.argmin(1), starts + pieces.argmax(1), [n - 1]])
    kept = np.unique(kept.clip(max=n - 1))
    return Series(steps[kept], values[kept])


class _Column:
    """Values of a key, and their rows: a range for as long as they follow each other, else their numbers."""

    def __init__(self) -> None:
        self.first, self.found, self.numbers = 0, array("d"), None

    def add(self, row: int, values: NDArray[np.float64]) -> None:
        """Adds the values of rows that begin with `row`; NaN stands where there is none."""
        known = np.flatnonzero(np.abs(values) <= FP32_MAX)
        if not len(known):
            return
        count, rows = len(self.found), row + known
        if not count:
            self.first = int(rows[0])
        if self.numbers is None and (rows[0] != self.first + count or known[-1] - known[0] + 1 != len(known)):
            self.numbers = array("q", range(self.first, self.first + count))
        if self.numbers is not None:
            self.numbers.frombytes(rows.tobytes())
        self.found.frombytes(values[known].tobytes())

    def rows(self) -> NDArray[np.int64] | slice:
        """Returns the rows of the values."""
        if self.numbers is None:
            return slice(self.first, self.first + len(self.found))
        return np.frombuffer(self.numbers, np.int64)

    def values(self) -> NDArray[np.float64]:
        """Returns the values."""
        return np.frombuffer(self.found)


def _table(records: list[Record]) -> dict[str, NDArray[np.float64]]:
    """Returns the values of each key, NaN in records that have no number there."""
    rows_with: dict[tuple[str, ...], list[int]] = {}
    for row, record in enumerate(records):
        rows_with.setdefault(tuple(record), []).append(row)
    columns: dict[str, NDArray[np.float64]] = {}
    for keys, rows in rows_with.items():
        values = _numbers([list(records[row].values()) for row in rows])
        for place, key in enumerate(keys):
            columns.setdefault(key, np.full(len(records), np.nan))[rows] = values[:, place]
    return columns


def _numbers(rows: list[list[object]]) -> NDArray[np.float64]:
    """Returns rows of equal length as an array; NaN for what is no number."""
    if {type(value) for row in rows for value in row} <= {int, float, type(None)}:
        try:
            return np.array(rows, dtype=np.float64)  # None becomes NaN
        except OverflowError:  # an integer beyond fp64
            pass
    return np.array([[finite(value) for value in row] for row in rows], dtype=np.float64)
