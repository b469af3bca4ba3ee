"""Result files in the format of `make bench`, for the tests of their readers."""

import json
from pathlib import Path

from bench.measurement import Ratio, StepMeasurement


def step_row(name: str, *, kind: str = "ablation", seconds: float = 2.0, ratio: Ratio | None = None) -> StepMeasurement:
    return StepMeasurement(
        kind=kind, name=name, size="tiny", images=4, seconds=[seconds], tflop=1.0, ratio=ratio, peak_bytes=2**30
    )


def save(path: Path, rows: list[StepMeasurement], device: str = "somewhere") -> Path:
    """Writes a file in pytest-benchmark's format."""
    benchmarks = [{"extra_info": row.extra_info(), "stats": {"data": row.seconds}} for row in rows]
    saved = {
        "machine_info": {"device": device, "threads": 2, "versions": {"torch": "1", "lightly": "2"}},
        "commit_info": {"id": "0123456789abc", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(saved))
    return path
