"""Tests of step times, without warm-up, logging and saving."""

import pytest
import torch

from mnclglf.training import timing
from mnclglf.training.timing import Speed, StepClock, peak_memory_bytes, speed_of

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns a settable clock: a list with the time."""
    at = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: at[0])
    return at


def test_a_clock_leaves_out_the_warm_up_and_what_is_no_step(now: list[float]) -> None:
    clock = StepClock(CPU, warm_up=2)
    for seconds in (50.0, 9.0, 1.0, 2.0):
        now[0] += seconds
        clock.stop(waited=0.25)
    assert clock.times() == [1.0, 2.0]
    assert clock.take() == (1.0, [1.0, 2.0])
    now[0] += 7.0  # logging
    clock.restart()
    now[0] += 3.0
    clock.stop(waited=0.5)
    assert clock.take() == (0.5, [3.0])
    assert clock.take() == (0.0, [])
    assert list(clock.all) == [1.0, 2.0, 3.0]


def test_a_step_is_shared_out_among_its_phases(now: list[float]) -> None:
    clock = StepClock(CPU, warm_up=1)
    for data, forward, rest in ((9.0, 9.0, 9.0), (1.0, 4.0, 2.0), (3.0, 6.0, 2.0), (2.0, 5.0, 1.0)):
        for phase, seconds in (("data", data), ("forward", forward)):
            now[0] += seconds
            clock.mark(phase)
        now[0] += rest
        clock.stop(waited=0.0)
    assert clock.take_phases() == {"data": 2.0, "forward": 5.0, "update": 2.0}  # medians of the three after the warm-up
    assert clock.take_phases() == {}
    clock.mark("data")  # of a step that a save broke off
    clock.restart()
    now[0] += 1.0
    clock.stop(waited=0.0)
    assert clock.take_phases() == {"update": 1.0}


def test_without_warm_up_the_first_step_has_no_beginning(now: list[float]) -> None:
    clock = StepClock(CPU, warm_up=0)
    clock.stop(waited=0.0)
    now[0] += 1.5
    clock.stop(waited=0.0)
    assert clock.times() == [1.5]


def test_speed_is_the_median_with_the_slowest_and_fastest_tenth() -> None:
    seconds = [0.1 * value for value in range(1, 12)]  # 0.1 to 1.1: the tenths are 0.2, ..., 1.0
    assert speed_of(seconds, 12) == pytest.approx(Speed(0.6, 20.0, 12.0, 60.0))
    assert speed_of([0.5], 4) == Speed(0.5, 8.0, 8.0, 8.0)
    assert speed_of([], 4) is None


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory_bytes(CPU)
    size = before + 2**28
    held = torch.ones(size, dtype=torch.uint8)
    assert size < peak_memory_bytes(CPU) < 3 * size
    del held
