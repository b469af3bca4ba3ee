"""The short form of the load test, and its verdict."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.faults import load
from bench.faults.load import GROWTH_BYTES, Sample, growth, is_flat, run

HELD = Sample(resident_bytes=900 << 20, descriptors=7, threads=5, children=0, shared=2)


def test_what_grows_is_found() -> None:
    assert is_flat(growth([HELD] * 40))
    warm_up = [replace(HELD, resident_bytes=i << 20, threads=1, descriptors=i) for i in range(4)]
    assert is_flat(growth(warm_up + [HELD] * 36))
    for name in load.COUNTS:
        assert not is_flat(growth([replace(HELD, **{name: 9 + i // 30}) for i in range(40)]))
    leak = 2 * GROWTH_BYTES // 40
    assert not is_flat(growth([replace(HELD, resident_bytes=HELD.resident_bytes + i * leak) for i in range(40)]))


def test_a_sample_counts_what_is_open() -> None:
    before = load.sample()
    file = os.open(os.devnull, os.O_RDONLY)
    try:
        assert load.sample().descriptors == before.descriptors + 1
    finally:
        os.close(file)
    assert before.resident_bytes > 1 << 20


@pytest.mark.parametrize("subject", ["training", "dali of files"])
def test_steps_and_batches_leave_nothing_open(subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "SAMPLES", 20)
    grown = growth(run(subject, 40 if subject == "training" else 200, tmp_path))
    # Other tests of this process may end threads meanwhile, and others share /dev/shm; the long form judges memory.
    assert max(grown[name] for name in load.COUNTS if name != "shared") <= 0
