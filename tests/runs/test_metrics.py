"""Tests of metrics.jsonl: its lines are JSON, and lines of other hands are read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mnclglf.runs.metrics import elapsed_seconds, line_of, read_records


def strict(text: str) -> Any:
    """Parses JSON as other readers do, jq or JavaScript, which know no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_null(value: float) -> None:
    line = line_of({"step": 3, "gradient_norm": value, "loss": 1.5, "neighbor_agreement": None})
    assert strict(line) == {"step": 3, "gradient_norm": None, "loss": 1.5, "neighbor_agreement": None}
    assert line.endswith("}\n")


def test_lines_of_earlier_versions_are_read_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "lr": Infinity, "a": 1e999}\n{"step": 2, "loss": 0.5, "lr": -Infinity}\n')
    assert read_records(path) == ([{"step": 1, "loss": None, "lr": None, "a": None},
                                   {"step": 2, "loss": 0.5, "lr": None}], 0)  # fmt: skip


def test_the_elapsed_time_is_the_newest_that_is_known() -> None:
    assert elapsed_seconds([]) is None
    assert elapsed_seconds([{"step": 1}]) is None
    records: list[dict[str, Any]] = [
        {"step": 1, "elapsed_seconds": 4}, {"step": 2, "elapsed_seconds": 7.5}, {"step": 3},
        {"step": 4, "elapsed_seconds": None}, {"step": 5, "elapsed_seconds": "9"}, {"step": 6, "elapsed_seconds": True},
    ]  # fmt: skip
    assert elapsed_seconds(records) == 7.5
