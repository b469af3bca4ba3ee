"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Catches SIGINT, SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP (a closed terminal) inside its `with` block.

    A second signal ends the process as usual, except in a rank of torchrun: Slurm signals every process of a job step,
    and torchrun hands its own signal on, so that one request comes twice; torchrun kills ranks that do not end in time.
    SIGHUP stays ignored under nohup. Only a process's main thread can catch signals; in another thread none is caught,
    and the main thread gets them as usual.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            caught = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                caught.append(signal.SIGHUP)
            self.earlier = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self.earlier.items():
            # None: not set from Python, and not to be put back from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if "RANK" not in os.environ:
            self._put_back()
