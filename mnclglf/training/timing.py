"""Step times of a run, without its warm-up and without making the host wait for the device."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mnclglf.data.loader import Batch, Loader

LAST_PHASE = "update"  # of a step: what follows its last mark
WARM_UP_STEPS = 3  # first steps of a process: libraries initialize, caches fill, CUDA graphs are captured


class Speed(NamedTuple):
    """Speed of some steps: median, and the slowest (p10) and the fastest (p90) tenth."""

    step_seconds: float
    images_per_second: float
    images_per_second_p10: float
    images_per_second_p90: float


def speed_of(seconds: Sequence[float], batch_size: int) -> Speed | None:
    """Returns the speed of steps that took `seconds` each; None for no steps."""
    if not seconds:
        return None
    if len(seconds) == 1:
        seconds = [*seconds, *seconds]  # quantiles needs two values
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    rate = [batch_size / value for value in (tenths[4], tenths[8], tenths[0])]
    return Speed(tenths[4], *rate)


class StepClock:
    """Times steps on the device's own clock, from the end of one to the end of the next, including the wait for data.

    On CUDA the ends are events on the stream. Their times are read only when the run waits for the device anyway, as a
    wait after each step would stop the host from working ahead.

    Args:
        device: device of the steps.
        warm_up: number of first steps whose times are left out.
    """

    def __init__(self, device: torch.device, warm_up: int = WARM_UP_STEPS) -> None:
        self.cuda, self.warm_up = device.type == "cuda", warm_up
        self.last: torch.cuda.Event | float | None = None
        self.spans: list[tuple[torch.cuda.Event | float, torch.cuda.Event | float]] = []
        self.waited = 0.0
        self.all = array("d")
        """Seconds of each step that `take` has returned so far; 8 bytes per step."""
        self.marks: list[tuple[str, torch.cuda.Event | float]] = []
        """Ends of the phases of the step that is running."""
        self.phases: dict[str, list[tuple[torch.cuda.Event | float, torch.cuda.Event | float]]] = {}
        """Start and end of each phase of each step since the last `take_phases`."""

    def mark(self, phase: str) -> None:
        """Ends a phase of the step; the first one begins with the step."""
        self.marks.append((phase, self._now()))

    def stop(self, waited: float) -> None:
        """Ends a step, before which the host waited `waited` seconds for data, and begins the next."""
        now, self.waited = self._now(), self.waited + waited
        if self.warm_up > 0:
            self.warm_up -= 1
        elif self.last is not None:
            self.spans.append((self.last, now))
            begun = self.last
            for phase, end in [*self.marks, (LAST_PHASE, now)]:
                self.phases.setdefault(phase, []).append((begun, end))
                begun = end
        self.last, self.marks = now, []

    def restart(self) -> None:
        """Begins the next step now: logging or saving since the last one belongs to no step."""
        self.last, self.marks = self._now(), []

    def times(self) -> list[float]:
        """Returns the seconds of each step since the last `take`; on CUDA the device must have finished them."""
        return [_seconds(start, end) for start, end in self.spans]

    def take_phases(self) -> dict[str, float]:
        """Returns the median seconds of each phase since the last call, by the names of `mark`; the last is "update".

        Empty if no step was timed. On CUDA the device must have finished the steps.
        """
        phases, self.phases = self.phases, {}
        return {name: statistics.median(_seconds(*span) for span in spans) for name, spans in phases.items()}

    def take(self) -> tuple[float, list[float]]:
        """Returns (seconds waited for data, seconds of each step) since the last call."""
        waited, times = self.waited, self.times()
        self.waited, self.spans = 0.0, []
        self.all.extend(times)
        return waited, times

    def _now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - start


class Waiting:
    """Measures the time that a run waits for data.

    The wait for the first batch is kept apart, as it includes the start of the loader.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.first = self.later = self.elapsed = 0.0
        """Seconds of the first wait, of the later waits, and from the first batch to the latest reading."""

    def timed(self, loader: Loader, start: int, stop: int) -> Iterator[tuple[int, Batch, float]]:
        """Yields (step, batch, seconds waited for it) for the global steps from start up to stop.

        The seconds are 0 for the first step.
        """
        began, batches = self.clock(), loader.batches(start, stop)
        for step in range(start, stop):
            since = self.clock()
            batch = next(batches)
            now = self.clock()
            if step == start:
                self.first, began, since = now - began, now, now
            self.later, self.elapsed = self.later + now - since, now - began
            yield step, batch, now - since
            self.elapsed = self.clock() - began

    def summary(self) -> str:
        share = self.later / self.elapsed if self.elapsed else 0.0
        return f"waited {share:.1%} of the time for data, and {self.first:.1f} s for the first batch"


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory: of tensors since `forget_peak_memory` on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # not getrusage: it counts what the parent had when it started this process
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def forget_peak_memory(device: torch.device) -> None:
    """Resets the peak on a GPU: that of the warm-up includes memory for choosing kernels, which no later step needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
