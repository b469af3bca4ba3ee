"""Measures training steps in interleaved rounds, each step in a process of its own.

A process of its own, because fast math, kept memory and the allocator's state belong to the whole process.
`python -m bench.rounds NAME IMAGES SIDE WIDTH` is such a process: it makes a step, warms it up, and answers each line
that it reads with the seconds of one step.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measurement import Ratio, StepMeasurement, ratio
from bench.steps import COMPILED, GRAPHS, KEEPING, MAKERS, Size, Step
from mnclglf.config import EngineConfig
from mnclglf.training.roofline import best_seconds
from mnclglf.training.start import choose_machine
from mnclglf.training.timing import forget_peak_memory, peak_memory_bytes

ROOT = Path(__file__).resolve().parents[1]
STEPS_ON_A_GPU = 20  # per round: one step alone would be mostly launch latency
MATMUL = 4096  # side of the square matrices whose product measures the machine's rate


class Contender:
    """A training step in its own process, ready to be called.

    Attributes:
        tflop: operations per step (10^12) by PyTorch's counter; None where compiling hides them.
        warm_up_seconds: from the start of the first step to the end of the second.

    Raises:
        RuntimeError: the process ended.
    """

    def __init__(self, name: str, size: Size) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.rounds", name, *map(str, size)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            ready = self._answer()
        except BaseException:
            self.stop()
            raise
        self.tflop: float | None = ready["tflop"]
        self.warm_up_seconds: float = ready["warm_up_seconds"]

    def seconds(self) -> float:
        """Runs the step once and returns its seconds."""
        return self._ask("step")["seconds"]

    def peak_bytes(self) -> int:
        """Returns the most memory alive so far: tensors on a GPU, the whole process on a CPU."""
        return self._ask("memory")["peak_bytes"]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            killed = ", killed: is there too little memory?" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"the process of {self.name!r} ended with exit code {code}{killed}")
        return json.loads(line)


@contextmanager
def contenders(names: Sequence[str], size: Size) -> Generator[list[Contender]]:
    """Starts and warms up the processes of these steps, one after another; stops them at the end."""
    with ExitStack() as stack:
        started: list[Contender] = []
        for name in names:
            started.append(Contender(name, size))
            stack.callback(started[-1].stop)
        yield started


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Training steps to measure in interleaved rounds.

    Attributes:
        kind: "ablation" or "peers", see StepMeasurement.
        names: keys of MAKERS; all are compared with the first.
        size: size of the steps.
        rounds: every round calls each step once, on a GPU for STEPS_ON_A_GPU steps.
    """

    kind: str
    names: tuple[str, ...]
    size: Size
    rounds: int

    def measure(self) -> tuple[dict[str, StepMeasurement], list[float]]:
        """Returns each step's measurement, and this process's matrix-product rate (FLOP/s) of each round."""
        rates: list[float] = []
        give_back(
            choose_machine(EngineConfig()).device
        )  # this process may still hold memory of what it measured before
        with contenders(self.names, self.size) as started:
            seconds: dict[str, list[float]] = {contender.name: [] for contender in started}
            for _ in range(self.rounds):
                for contender in started:
                    seconds[contender.name].append(contender.seconds())
                rates.append(matmul_rate())
            peaks = {contender.name: contender.peak_bytes() for contender in started}
            tflop = {contender.name: contender.tflop for contender in started}
        return self.results(seconds, tflop, peaks), rates

    def results(
        self, seconds: Mapping[str, list[float]], tflop: Mapping[str, float | None], peaks: Mapping[str, int]
    ) -> dict[str, StepMeasurement]:
        first = self.names[0]

        def against(name: str) -> Ratio | None:
            if name == first:
                return None
            if self.kind == "ablation":
                return ratio(seconds[first], seconds[name])
            own, theirs = tflop[first] or 1.0, tflop[name] or 1.0
            return ratio([s / theirs for s in seconds[name]], [s / own for s in seconds[first]])

        return {
            name: StepMeasurement(
                kind=self.kind,
                name=name,
                size=str(self.size),
                images=self.size.images,
                seconds=seconds[name],
                tflop=tflop[name],
                ratio=against(name),
                peak_bytes=peaks[name],
            )
            for name in self.names
        }


def matmul_rate() -> float:
    """Measures the FLOP/s of a large matrix product in the autocast dtype."""
    machine = choose_machine(EngineConfig())
    square = torch.randn(MATMUL, MATMUL, device=machine.device).to(machine.dtype)
    return 2 * MATMUL**3 / best_seconds(lambda: square @ square, machine.device, rounds=2)


def timed(step: Step, device: torch.device, *, keeps: bool) -> float:
    """Returns the seconds of one step: on a GPU the mean of STEPS_ON_A_GPU steps in a row.

    A step to warm up comes first where the process `keeps` memory, which it gave back after the last round.
    """
    if keeps or device.type == "cuda":
        step()
    if device.type == "cpu":
        since = time.perf_counter()
        step()
        return time.perf_counter() - since
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS_ON_A_GPU):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / STEPS_ON_A_GPU


def give_back(device: torch.device) -> None:
    """Gives the memory that this process keeps back to the system, so that the other processes have room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    name, *numbers = sys.argv[1:]
    device = choose_machine(EngineConfig()).device
    step = MAKERS[name](Size(*map(int, numbers)), device)
    since, tflop = time.perf_counter(), None
    if name in (COMPILED, GRAPHS):
        step()
    else:
        with FlopCounterMode(display=False) as counter:
            step()
        tflop = counter.get_total_flops() / 1e12
    step()
    forget_peak_memory(device)
    warm_up_seconds = time.perf_counter() - since
    give_back(device)
    print(json.dumps({"tflop": tflop, "warm_up_seconds": warm_up_seconds}), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps({"peak_bytes": peak_memory_bytes(device)}), flush=True)
            continue
        print(json.dumps({"seconds": timed(step, device, keeps=name in KEEPING)}), flush=True)
        give_back(device)


if __name__ == "__main__":
    main()
