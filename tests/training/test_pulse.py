"""The signs of life of a rank, when the store in which ranks meet fails for a moment."""

from collections.abc import Iterator

import pytest
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mnclglf.training import pulse
from mnclglf.training.pulse import Pulse


class Failing:
    """A connection that no longer answers."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("timed out")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.0)
    return store


def test_signs_of_life_go_on_after_a_failed_connection(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    own, said = Pulse(), list[str]()

    class Answering:
        def set(self, key: str, value: str) -> None:
            said.append(value)
            own.ending.set()

    opened: Iterator[object] = iter([None, Failing(), Answering()])
    monkeypatch.setattr(pulse, "open_store", lambda: next(opened))
    own.start(1, "a start")
    assert own.thread is not None
    own.thread.join()
    assert [value.split()[0] for value in said] == ["3"]


def test_a_store_that_is_gone_is_not_asked(monkeypatch: pytest.MonkeyPatch, server: TCPStore) -> None:
    own, waited = Pulse(), list[float]()

    def opened() -> Store:
        raise AssertionError("torch prints a stack trace for each connection that fails")

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        own.ending.set()
        return True

    monkeypatch.setattr(pulse, "open_store", opened)
    monkeypatch.setattr(own.ending, "wait", wait)
    monkeypatch.setenv("MASTER_PORT", "1")
    own.start(1, "a start")
    assert own.thread is not None
    own.thread.join()
    assert len(waited) == 1
