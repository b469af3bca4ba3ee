"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Catches SIGINT and SIGTERM inside its `with` block; a second signal ends the process as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self.earlier: dict[int, Any] = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._put_back()
