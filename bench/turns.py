"""Training steps that take turns, each in a process of its own: what one sets for its process touches no other.

`python -m bench.turns NAME IMAGES SIDE WIDTH` is such a process: it makes a step, warms it up, and answers each line
that it reads with the seconds of one step.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.steps import COMPILED, GRAPHS, MAKERS, Size, Step
from mnclglf.config import EngineConfig
from mnclglf.engine.device import choose_device
from mnclglf.engine.timing import peak_memory_bytes

ROOT = Path(__file__).resolve().parents[1]
ON_A_GPU = 20  # steps of a turn


class Contender:
    """A step in its own process, ready to be called.

    Attributes:
        tflop: of a step, by PyTorch's counter; None where it is compiled, which hides it.
        warm_up_seconds: from the start of the first step to the end of the second.

    Raises:
        RuntimeError: the process ended.
    """

    def __init__(self, name: str, size: Size) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.turns", name, *map(str, size)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._answer()
        self.tflop: float | None = ready["tflop"]
        self.warm_up_seconds: float = ready["warm_up_seconds"]

    def seconds(self) -> float:
        """Of one step, now."""
        return self._ask("step")["seconds"]

    def peak_bytes(self) -> int:
        """Most memory that the steps so far have had alive: tensors on a GPU, the process on a CPU."""
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
            raise RuntimeError(f"the process of {self.name!r} ended with exit code {self.process.wait()}")
        return json.loads(line)


def take_turns(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each contender, round by round; every round calls each of them once."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            seconds[contender.name].append(contender.seconds())
    return seconds


def timed(step: Step, device: torch.device) -> float:
    """Seconds of a step: on a CPU of one, on a GPU the mean of some that follow each other, after one to warm up."""
    if device.type == "cpu":
        since = time.perf_counter()
        step()
        return time.perf_counter() - since
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(ON_A_GPU):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / ON_A_GPU


def give_back(device: torch.device) -> None:
    """Returns memory that the process keeps, so that the others have room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    name, *numbers = sys.argv[1:]
    device = choose_device(EngineConfig())
    step = MAKERS[name](Size(*map(int, numbers)), device)
    since, tflop = time.perf_counter(), None
    if name in (COMPILED, GRAPHS):
        step()
    else:
        with FlopCounterMode(display=False) as counter:
            step()
        tflop = counter.get_total_flops() / 1e12
    step()
    print(json.dumps({"tflop": tflop, "warm_up_seconds": time.perf_counter() - since}), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps({"peak_bytes": peak_memory_bytes(device)}), flush=True)
            continue
        print(json.dumps({"seconds": timed(step, device)}), flush=True)


if __name__ == "__main__":
    main()
