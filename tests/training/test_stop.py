"""Tests of the signals that stop a run: which are caught, where, and what is put back."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mnclglf.training.stop import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_the_second_ends_as_usual(number: signal.Signals) -> None:
    seen: list[int] = []
    signal.signal(number, lambda caught, _: seen.append(caught))
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert (stop.signal, seen) == (number, [])
        os.kill(os.getpid(), number)
        assert seen == [number]
    os.kill(os.getpid(), number)
    assert seen == [number, number]


def test_a_rank_takes_a_signal_that_comes_twice_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda caught, _: seen.append(caught))
    with StopRequest() as stop:
        for _ in range(2):  # from Slurm, and from torchrun, which got it as well
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.signal, seen) == (signal.SIGTERM, [])


def test_nohup_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.signal)
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, *before]
