"""Measures the implementations of one case in interleaved rounds: each round calls every one of them once.

pytest-benchmark finishes one test before it starts the next, and on a shared machine such timings do not compare. So
the rounds run here, once per case. Each test of pytest-benchmark then replays its seconds on a clock that shows nothing
else, so that its table, its JSON and the printed lines have one source.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.measurement import HEADINGS, REFERENCE, OperatorMeasurement, StepMeasurement, ratio
from mnclglf.config import EngineConfig
from mnclglf.training.start import choose_machine
from mnclglf_kernels import resolve
from mnclglf_kernels.backend import INTERPRETED, Kind

Direction = Literal["forward", "backward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
BOTH = DIRECTIONS[-1]

MACHINE = choose_machine(EngineConfig())
DEVICE, AUTOCAST = MACHINE.device, MACHINE.dtype
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CASE_SECONDS = 1.5  # spent on the rounds of a case, unless LEAST_ROUNDS take longer
LEAST_ROUNDS, MOST_ROUNDS = 7, 100

QUICK = os.environ.get("MNCLGLF_BENCH_QUICK", "") not in ("", "0")  # a subset of the cases, at smaller sizes

left_out: dict[str, str] = {}  # implementation -> why it cannot run here; filled while pytest collects


@dataclass(frozen=True)
class Implementation:
    """A backend of mnclglf_kernels, or REFERENCE, in one dtype; bf16 means under autocast."""

    backend: Any
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend} {DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Work:
    """A forward call to measure, and the leaves that its gradient reaches."""

    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class BenchCase:
    """One operator at one shape in one direction; `make` builds the inputs and the call of an implementation."""

    operator: str
    shape: str
    direction: Direction
    kind: Kind
    make: Callable[[Implementation], Work]


def by_implementation(cases: Sequence[BenchCase]) -> pytest.MarkDecorator:
    """Parametrizes a test by case and implementation, over what runs here."""
    pairs = [(case, implementation) for case in cases for implementation in implementations(case.kind)]
    ids = [f"{case.operator}: {case.shape}, {case.direction}, {implementation}" for case, implementation in pairs]
    return pytest.mark.parametrize(("case", "implementation"), pairs, ids=ids)


def implementations(kind: Kind) -> list[Implementation]:
    """Returns the implementations that run here, the reference first; adds the others to `left_out`."""
    dtypes = list(dict.fromkeys((torch.float32, AUTOCAST)))
    if len(dtypes) == 1:
        left_out["bf16"] = f"{DEVICE} does not multiply it in hardware, so training does not use it here"
    wanted = [Implementation(backend, dtype) for backend in (REFERENCE, "torch", "triton") for dtype in dtypes]
    if kind == "lookup":
        wanted.append(Implementation("faiss", torch.float32))
    found = []
    for implementation in wanted:
        reason = problem(implementation, kind)
        if reason is None:
            found.append(implementation)
        else:
            left_out[implementation.backend] = reason
    return found


def problem(implementation: Implementation, kind: Kind) -> str | None:
    """Returns why an implementation cannot run here, or None."""
    if implementation.backend == REFERENCE:
        return None
    if implementation.backend == "triton" and DEVICE.type != "cuda" and INTERPRETED:
        return "its kernels are interpreted (TRITON_INTERPRET=1), and the time of that says nothing about them"
    try:
        resolve(implementation.backend, torch.empty(1, dtype=implementation.dtype, device=DEVICE), kind=kind)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None


def call(case: BenchCase, implementation: Implementation) -> Callable[[], object]:
    """Returns the call of one round. As in the step, a bf16 forward runs under autocast and a backward does not."""
    work = case.make(implementation)

    def forward() -> Sequence[Tensor]:
        dtype = implementation.dtype
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
            return work.forward()

    if case.direction == "forward":
        return forward
    outputs = forward()
    gradients = [torch.randn_like(output) for output in outputs]
    if case.direction == "backward":
        return lambda: torch.autograd.grad(outputs, work.leaves, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), work.leaves, gradients)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call by the wall clock, including the device's work."""
    since = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - since


def seconds_of(run: Callable[[], object]) -> float:
    """Returns the seconds of one call: wall clock on a CPU; on CUDA events with a cold L2, median over about 20 ms."""
    if DEVICE.type != "cuda":
        return timed(run, DEVICE)
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3  # pyright: ignore  # one number


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the most bytes of tensors that one call has alive at once, beyond those there before it."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # Allocations one by one: the profiler's tables add them up by operator, which hides the peak within one.
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def measure(case: BenchCase) -> dict[Implementation, OperatorMeasurement]:
    """Measures every implementation of a case that runs here, in interleaved rounds."""
    torch.manual_seed(0)
    runs = {implementation: call(case, implementation) for implementation in implementations(case.kind)}
    for run in runs.values():
        run()  # the first call compiles, imports and fills caches
    # FAISS allocates outside torch, where nothing counts.
    peaks = {key: None if key.backend == "faiss" else peak_bytes(run) for key, run in runs.items()}
    seconds: dict[Implementation, list[float]] = {key: [] for key in runs}
    since = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - since > CASE_SECONDS:
            break
        for key, run in runs.items():
            seconds[key].append(seconds_of(run))
    return results(case, seconds, peaks)


def results(
    case: BenchCase, seconds: Mapping[Implementation, list[float]], peaks: Mapping[Implementation, int | None]
) -> dict[Implementation, OperatorMeasurement]:
    """Returns the measurements of a case, with the ratios to its references."""

    def against(dtype: torch.dtype, key: Implementation) -> Any:
        reference = Implementation(REFERENCE, dtype)
        return None if key == reference else ratio(seconds[reference], seconds[key])

    return {
        key: OperatorMeasurement(
            operator=case.operator,
            shape=case.shape,
            direction=case.direction,
            backend=key.backend,
            dtype=DTYPES[key.dtype],
            seconds=own,
            ratio=against(torch.float32, key),
            like_with_like=None if key.dtype == torch.float32 else against(key.dtype, key),
            peak_bytes=peaks[key],
        )
        for key, own in seconds.items()
    }


def line(name: str, cells: Sequence[str] = HEADINGS) -> str:
    """Formats one line of the terminal's table."""
    median, fp32, bf16, peak = cells
    return f"  {name:18}{median:>12}{fp32:>26}{bf16:>26}{peak:>12}"


class Clock:
    """Clock that shows a set time."""

    now = 0.0


def replayed_seconds() -> float:
    """Returns the set time, as the timer of pytest-benchmark."""
    return Clock.now


def replay(benchmark: BenchmarkFixture, measured: OperatorMeasurement | StepMeasurement) -> None:
    """Gives pytest-benchmark a measurement and its rounds."""
    benchmark.group = measured.case
    benchmark.name = measured.implementation
    benchmark.params = None  # the test's parameters are objects, which JSON cannot hold
    benchmark.extra_info.update(measured.extra_info())
    pending = iter(measured.seconds)

    def start() -> None:
        Clock.now = 0.0

    def stop() -> None:
        Clock.now = next(pending)

    benchmark.pedantic(stop, setup=start, rounds=len(measured.seconds))
