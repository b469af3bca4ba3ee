"""Lines of metrics.jsonl: one JSON object per line with the figures of a step. Imports nothing of ours.

JSON has no NaN and no infinity. Such a figure, as of a step of fp16 that overflowed, is null. Earlier versions wrote
NaN.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

Record = dict[str, Any]

FORMER_KEYS = {"limit_share": "roofline_fraction"}
"""Keys in files of earlier versions, and their present names."""


def line_of(record: Record) -> str:
    """Returns the line of a record, with its newline."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def elapsed_seconds(records: list[Record]) -> float | None:
    """Returns the newest elapsed_seconds of the records; None if none has a number there."""
    values = (record.get("elapsed_seconds") for record in reversed(records))
    return next((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)), None)


def read_records(path: Path) -> tuple[list[Record], int]:
    """Returns the records of a metrics.jsonl and the number of lines that are no record, without a torn last one.

    Raises:
        ValueError: there are lines, but no record among them.
    """
    if not path.exists():
        return [], 0
    *lines, last = path.read_text(errors="replace").split("\n")
    by_step: dict[int, Record] = {}
    unreadable = 0
    for line in [*lines, last]:
        record = _parse_record(line)
        if record is not None:
            by_step[record["step"]] = record
        elif line.strip() and line is not last:
            unreadable += 1
    if unreadable and not by_step:
        raise ValueError(f"{path} holds {unreadable} lines and not one record; it is no metrics file, or damaged")
    return [by_step[step] for step in sorted(by_step)], unreadable


def step_of(record: Record) -> int | None:
    """Returns the step of a record; None if it is missing or not a step."""
    step = record.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else None


def _parse_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or step_of(cast("Record", record)) is None:
        return None
    return _finite({FORMER_KEYS.get(key, key): value for key, value in cast("Record", record).items()})


def _finite(record: Record) -> Record:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
