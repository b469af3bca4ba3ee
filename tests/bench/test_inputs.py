"""Damaged inputs, a few of each kind, and that each kind of loss is seen."""

import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults import inputs
from bench.faults.inputs import KINDS, Lost, Tally, attack


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # put back after the attack, which sets it


def test_no_input_is_lost() -> None:
    found = list(attack(dict.fromkeys(KINDS, 4), seed=0))
    assert {tally.kind: tally.lost for tally in found if tally.lost} == {}
    assert {tally.kind for tally in found} == set(KINDS)
    assert all(tally.read + tally.refused == tally.tried for tally in found)
    assert sum(tally.read for tally in found) > 10  # else nothing would be read that is damaged


def raised(error: Exception) -> Callable[[random.Random, Path], None]:
    def one(draw: random.Random, place: Path) -> None:
        if draw.random() < 0.5:
            raise error

    return one


def of(one: Callable[[random.Random, Path], None], monkeypatch: pytest.MonkeyPatch) -> Tally:
    monkeypatch.setitem(KINDS, "made", one)
    (tally,) = attack({"made": 12}, seed=1)
    return tally


def test_each_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(draw: random.Random, place: Path) -> None:
        if draw.random() < 0.5:
            os.kill(os.getpid(), signal.SIGKILL)

    def runs_code(draw: random.Random, place: Path) -> None:
        if draw.random() < 0.5:
            Path(os.environ["MARKER"]).touch()

    refused = of(raised(ValueError("a word")), monkeypatch)
    assert refused.lost == []
    assert 0 < refused.read < 12
    assert refused.read + refused.refused == 12
    for one, told in (
        (raised(KeyError("a")), "KeyError in test_inputs.py"),
        (raised(ValueError("")), "ValueError without a message"),
        (raised(RecursionError("deep")), "RecursionError"),
        (raised(Lost("other numbers")), "other numbers"),
        (killed, f"the process ended, status {int(signal.SIGKILL)}"),
        (runs_code, "code was run"),
    ):
        found = of(one, monkeypatch)
        assert len(found.lost) == 12 - found.read > 0
        assert all(told in line for line in found.lost)


def test_no_end_and_too_much_memory_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SECONDS", 1)
    monkeypatch.setattr(inputs, "LARGEST", 2**25)

    def waits(draw: random.Random, place: Path) -> None:
        if draw.random() < 0.1:
            time.sleep(60)

    calls: list[None] = []

    def takes(draw: random.Random, place: Path) -> None:
        calls.append(None)
        if len(calls) > 1 and draw.random() < 0.5:  # what the first call takes is not counted
            with mmap.mmap(-1, 2**27) as memory:  # bytes might lie where this process has freed some
                for page in range(0, len(memory), mmap.PAGESIZE):
                    memory[page] = 1

    found = of(waits, monkeypatch)
    assert 0 < len(found.lost) == 12 - found.read
    assert all("no end" in line for line in found.lost)
    monkeypatch.setattr(inputs, "SECONDS", 60)
    found = of(takes, monkeypatch)
    assert 0 < len(found.lost) == 12 - found.read
    assert all("MiB more" in line for line in found.lost)
