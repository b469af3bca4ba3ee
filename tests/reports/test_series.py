"""Tests of the figures as arrays: those of a list of all records, and a thinned curve that looks like all of it."""

import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from made_metrics import metrics_of

from mnclglf.reports.page import (
    _waiting_share,  # pyright: ignore[reportPrivateUsage]
    progress,
    render,
)
from mnclglf.reports.run_files import RunFiles
from mnclglf.reports.series import DRAWN_POINTS, Metrics, Series, finite, read_metrics, thin
from mnclglf.runs.metrics import Record

NUMBERS = st.one_of(st.floats(), st.integers(-3, 3))
VALUES = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=2), st.integers(), st.just([1.0]))
KEYS = st.sampled_from(["loss", "loss_s", "epoch"])
RECORDS = st.lists(st.tuples(st.integers(0, 12), st.dictionaries(KEYS, VALUES)), max_size=24)


def as_lists(series: Series) -> tuple[list[int], list[float]]:
    return series.steps.tolist(), series.values.tolist()


@given(RECORDS, st.integers(1, 30))
def test_series_are_those_of_all_records(pairs: list[tuple[int, Record]], at_once: int) -> None:
    records = [{"step": step, **figures} for step, figures in pairs]
    by_step = {record["step"]: record for record in records}
    kept = [by_step[step] for step in sorted(by_step)]
    metrics = metrics_of(records, at_once)
    assert metrics.steps.tolist() == [record["step"] for record in kept]
    for key in ("step", "loss", "loss_s", "epoch", "missing"):
        known = [(record["step"], value) for record in kept if (value := finite(record.get(key))) is not None]
        assert as_lists(metrics.of(key)) == ([step for step, _ in known], [value for _, value in known])
    assert set(metrics.series) == {key for record in records for key in record}
    reached = progress(RunFiles(folder=Path("."), metrics=metrics))
    assert (reached and reached.epoch) == (finite(kept[-1].get("epoch")) if kept else None)


@given(st.lists(st.tuples(*[st.none() | st.floats(0, 9)] * 2), max_size=12))
def test_the_time_waited_is_of_records_that_have_both_figures(figures: list[tuple[float | None, float | None]]) -> None:
    records = [
        {"step": 3 * i, "data_wait_seconds": wait, "images_per_second": speed}
        for i, (wait, speed) in enumerate(figures, 1)
    ]
    both = [(wait, speed) for wait, speed in figures[1:] if wait is not None and speed]
    trained = sum(3 * 10 / speed for _, speed in both)
    expected = min(1.0, sum(wait for wait, _ in both) / trained) if trained else None
    run = RunFiles(folder=Path("."), metrics=metrics_of(records), config={"optim": {"batch_size": 10}})
    assert _waiting_share(run) == (None if expected is None else pytest.approx(expected))


def test_only_finite_numbers_of_records_are_kept(tmp_path: Path) -> None:
    values: list[Any] = [2.5, math.nan, None, "1", True, [1.0], 1e39, 10**400, -math.inf, 1]
    lines = [json.dumps({"step": step, "loss": value}) for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"loss": 1}', '{"step": -1, "loss": 1}', '{"ste']))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert as_lists(metrics.of("loss")) == ([0, 9], [2.5, 1.0])
    assert (len(metrics.steps), metrics.unreadable_lines) == (10, 2)


@given(st.lists(st.floats(-5, 5), max_size=60), st.integers(4, 30))
def test_a_thinned_curve_has_the_ends_and_the_extremes_of_each_piece(values: list[float], most: int) -> None:
    n = len(values)
    full = Series(np.arange(0, 7 * n, 7), np.array(values, np.float64))
    steps, kept = thin(full, most)
    assert len(steps) <= most
    assert (np.diff(steps) > 0).all()
    assert np.array_equal(full.values[steps // 7], kept)
    if n <= most:
        assert len(steps) == n
        return
    assert (steps[0], steps[-1]) == (0, 7 * (n - 1))
    length = math.ceil(n / (most // 2 - 1))
    for first in range(0, n, length):
        piece = full.values[first : first + length]
        of_piece = kept[(steps >= 7 * first) & (steps < 7 * (first + length))]
        assert (of_piece.min(), of_piece.max()) == (piece.min(), piece.max())


def test_a_long_run_is_drawn_from_few_points_and_says_so() -> None:
    def page(count: int) -> str:
        records = [{"step": i, "loss": 5.0 + math.sin(i), "lr": 1 / i} for i in range(1, count + 1)]
        return render(RunFiles(folder=Path("."), metrics=metrics_of(records, 1000)))

    short, long, longer = page(DRAWN_POINTS), page(DRAWN_POINTS + 1), page(6 * DRAWN_POINTS)
    assert ["the curves are thinned" in text for text in (short, long, longer)] == [False, True, True]
    assert len(longer) < 1.5 * len(short)  # of six times as many points


def test_a_compared_run_keeps_its_last_step() -> None:
    metrics = metrics_of([{"step": i, "epoch": i / 10} for i in range(3 * DRAWN_POINTS)], 1000)
    thinned = metrics.thinned()
    assert len(thinned.of("epoch").steps) <= DRAWN_POINTS
    assert (thinned.steps[-1], thinned.at_the_end("epoch")) == (metrics.steps[-1], metrics.at_the_end("epoch"))
    assert Metrics().thinned().at_the_end("epoch") is None


@pytest.mark.slow
def test_a_million_records_take_little_more_than_their_figures(tmp_path: Path) -> None:
    noise, path = random.Random(0), tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 1_000_001):
            values = {f"loss_{i}": noise.random() for i in range(4)}
            file.write(json.dumps({"step": step, **values, "speed": None if step < 9 else 1.0}) + "\n")
    tracemalloc.start()
    metrics = read_metrics(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    figures = 8 * sum(len(series.steps) for series in metrics.series.values()) + metrics.steps.nbytes
    assert held < 1.2 * figures  # arrays grow by an eighth
    assert peak < 1.2 * figures + 24 * 2**20  # records of 1,024 lines, and a copy of an array as it grows
