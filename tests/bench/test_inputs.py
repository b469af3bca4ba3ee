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
from bench.faults.bombs import BOMBS
from bench.faults.inputs import KINDS, Lost, Tally, attack


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # put back after the attack, which sets it


BOMBS_OF_KINDS = [kind for kind in KINDS if kind.startswith("bomb: ")]
OTHERS = [kind for kind in KINDS if not kind.startswith("bomb: ")]


@pytest.mark.parametrize(
    ("kinds", "count"),
    [pytest.param(BOMBS_OF_KINDS, 1, marks=pytest.mark.slow, id="bombs"), pytest.param(OTHERS, 4, id="damaged")],
)
def test_no_input_is_lost(kinds: list[str], count: int) -> None:
    found = list(attack(dict.fromkeys(kinds, count), seed=0))
    assert {tally.kind: tally.lost for tally in found if tally.lost} == {}
    assert {tally.kind for tally in found} == set(kinds)
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

    def takes(draw: random.Random, place: Path) -> None:
        if draw.random() < 0.5:
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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("JPEG with 100,000 scans", "a.jpg .* a JPEG of 100,006 scans, more than 100: save it again"),
        ("IDX of 1 GiB that goes on for 8", "promises 1,073,741,824 bytes, more than 268,435,456"),
        ("tar.gz with a name of 8 GiB", "a name or its notes have 8,589,934,592 bytes"),
        ("tar.gz with notes of 8 GiB", "a name or its notes have 8,589,934,592 bytes"),
        ("Parquet of 4 MiB with 8 GiB of images", r"train.parquet tells of 4,\d*,\d* bytes and has images of \d*,"),
        ("Parquet with 10 million empty rows", "train.parquet tells of 10,000,000 rows"),
        ("settings, aliases of aliases", r"run.yaml has more than 10,000 values, with its aliases \(\*\)"),
        ("settings, an alias of itself", "run.yaml has more than 10,000 values"),
        ("settings of 1 TiB", "run.yaml has more than 1,048,576 characters"),
        ("metrics.jsonl, a line of 1 TiB", "metrics.jsonl is damaged: it holds a line of 4,194,304 bytes or more"),
        ("queue.npz of 130 kB with 128 MiB", "queue.npz is damaged: its arrays take 134,217,920 bytes, far more than"),
        ("queue.npz of 1 TiB", "queue.npz is damaged: it is no .npz file"),
        ("evaluation.json of 1 TiB", "more than 268,435,456 bytes; move it away: .*evaluation.json"),
    ],
)
def test_a_bomb_is_refused_by_name(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=told):
        BOMBS[name](tmp_path)


def test_what_only_looks_like_a_bomb_is_read(tmp_path: Path) -> None:
    for name in ("PNG of 1 x 60,000", "PNG of 60,000 x 1", "GIF with a million frames", "TIFF, a ring of pages"):
        BOMBS[name](tmp_path)
