"""Lines of metrics.jsonl: one JSON object per line with the figures of a step. Imports no torch.

JSON has no NaN and no infinity. Such a figure, as of a step of fp16 that overflowed, is null. Earlier versions wrote
NaN.

A long run has a million lines, of 600 bytes each. So they are read in one pass, some at a time, or from the end.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from mnclglf.runs.files import naming, open_file

Record = dict[str, Any]

TAIL_BYTES = 1 << 16  # holds some hundred records
LONGEST_LINE = 1 << 22  # bytes; a record has some hundred
LINES_AT_ONCE = 1024  # their records take 3 MB
FORMER_KEYS = {"limit_share": "roofline_fraction"}
"""Keys in files of earlier versions, and their present names."""
WRITTEN_BY_US = re.compile(rb'\{"step": (\d{1,15}), .*\}\n')


def line_of(record: Record) -> str:
    """Returns the line of a record, with its newline."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def stream_records(path: Path) -> Iterator[tuple[list[Record], int]]:
    """Iterates over a metrics.jsonl in one pass: lists of records, each with the number of lines that are no record.

    Records come in the order of their lines: a step that was taken again comes twice, and the later one counts. A
    figure may be NaN or infinite. A torn last line is left out.

    Raises:
        OSError: the file is there, but cannot be read.
        ValueError: there are lines, but no record among them, or a line of more than LONGEST_LINE bytes.
    """
    if not path.exists():
        return
    known = lost = 0
    with naming(path), open_file(path) as file:
        every = _lines(file, path)
        while lines := list(islice(every, LINES_AT_ONCE)):
            found = [_parse_record(line) for line in lines]
            records = [record for record in found if record is not None]
            unreadable = sum(
                record is None and line.endswith(b"\n") and not line.isspace()
                for record, line in zip(found, lines, strict=True)
            )
            known, lost = known + len(records), lost + unreadable
            yield records, unreadable
    _check_some(path, known, lost)


def read_records(path: Path) -> tuple[list[Record], int]:
    """Returns all records of a metrics.jsonl, of a run that is not long, and the number of lines that are no record.

    They are in the order of their steps, the later one of a step that was taken again. A torn last line is left out.

    Raises:
        ValueError: there are lines, but no record among them.
    """
    by_step: dict[int, Record] = {}
    unreadable = 0
    for records, lost in stream_records(path):
        by_step |= {record["step"]: _finite(record) for record in records}
        unreadable += lost
    return [by_step[step] for step in sorted(by_step)], unreadable


def last_record(path: Path, key: str = "step") -> Record | None:
    """Returns the last record of a metrics.jsonl with a number at `key`, reading from the end; None if there is none.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.exists():
        return None
    found = (_parse_record(line) for line in _lines_from_the_end(path))
    return next((_finite(record) for record in found if record and _is_finite_number(record.get(key))), None)


def copy_records(path: Path, to: BinaryIO, last_step: int) -> None:
    """Copies the lines of the records up to a step from a metrics.jsonl, if there is one; other lines are left out.

    Raises:
        ValueError: there are lines, but no record among them, or a line of more than LONGEST_LINE bytes.
    """
    if not path.exists():
        return
    known = lost = 0
    with open_file(path) as file:
        for line in _lines(file, path):
            ours = WRITTEN_BY_US.fullmatch(line)  # not parsed: a resumed run is not to wait for it
            step = int(ours[1]) if ours else (_parse_record(line) or {}).get("step")
            known, lost = (
                known + (step is not None),
                lost + (step is None and line.endswith(b"\n") and not line.isspace()),
            )
            if step is not None and step <= last_step:
                to.write(line if line.endswith(b"\n") else line + b"\n")
    _check_some(path, known, lost)


def _check_some(path: Path, known: int, lost: int) -> None:
    if lost and not known:
        raise ValueError(f"{path} holds {lost} lines and not one record; it is no metrics file, or damaged")


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{path} is damaged: it holds a line of {LONGEST_LINE:,} bytes or more; remove that line")
        yield line


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    with naming(path), open_file(path) as file:
        place, rest = file.seek(0, os.SEEK_END), b""
        while place:
            size = min(TAIL_BYTES, place)
            place -= size
            file.seek(place)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
            if len(rest) > LONGEST_LINE:  # no record: nor does anything before it count
                return
    yield rest


def _parse_record(line: bytes) -> Record | None:
    try:
        return _as_record(orjson.loads(line))
    except ValueError:
        pass
    try:
        return _as_record(json.loads(line.decode(errors="replace")))  # NaN, which earlier versions wrote
    except (ValueError, RecursionError):
        return None


def _as_record(value: object) -> Record | None:
    """Returns a record, with the present names of its keys; None if it is none, or its step is not a step."""
    if not isinstance(value, dict):
        return None
    record = cast("Record", value)
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        return None
    if not FORMER_KEYS.keys().isdisjoint(record):
        return {FORMER_KEYS.get(key, key): value for key, value in record.items()}
    return record


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(record: Record) -> Record:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
