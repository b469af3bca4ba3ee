"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)
"""Which ask a run to stop. Ranks that caught different ones stop with the first of them here: with SIGTERM, by which
torchrun itself stops ranks that it will start again, only if no rank caught another one."""


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
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            caught = [number for number in SIGNALS if not (number == signal.SIGHUP and ignored)]
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
