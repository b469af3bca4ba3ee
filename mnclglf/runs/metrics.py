"""metrics.jsonl: one JSON object a line, each a step's figures. Imports nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

Record = dict[str, Any]


def read_records(path: Path) -> tuple[list[Record], int]:
    """The records of a metrics.jsonl, and how many of its lines are none; a torn last line is not counted.

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
    """The step of a record, or None where it has none or what stands there cannot be one."""
    step = record.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else None


def _parse_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and step_of(cast("Record", record)) is not None else None
