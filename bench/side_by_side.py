"""The implementations of one case, measured in turn: every round calls each of them, so that all meet the same noise.

pytest-benchmark measures a row to its end before the next one, and on a machine that others use too such rows do not
compare. So the rounds are run here, once a case, and each row of pytest-benchmark replays its seconds on a clock that
moves by nothing but them: its table, its JSON and the printed lines have one source.
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

from bench.row import HEADINGS, REFERENCE, Row, StepRow, ratio
from mnclglf.config import EngineConfig
from mnclglf.training.start import autocast_dtype, choose_device
from mnclglf_kernels import resolve
from mnclglf_kernels.backend import INTERPRETED, Kind

Direction = Literal["forward", "backward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
BOTH = DIRECTIONS[-1]

DEVICE = choose_device(EngineConfig())
AUTOCAST = autocast_dtype(EngineConfig(), DEVICE)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CASE_SECONDS = 1.5  # of rounds, unless LEAST_ROUNDS take longer
LEAST_ROUNDS, MOST_ROUNDS = 7, 100

QUICK = os.environ.get("MNCLGLF_BENCH_QUICK", "") not in ("", "0")  # a subset of the cases, at smaller sizes

left_out: dict[str, str] = {}  # what cannot run here, and why; filled while pytest collects


@dataclass(frozen=True)
class Implementation:
    """A backend of mnclglf_kernels, or REFERENCE; in fp32, or under autocast to bf16."""

    backend: Any
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend} {DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Work:
    """What is measured: a forward call, and the leaves that its gradient reaches."""

    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Case:
    """One operator at one shape in one direction; `make` gives the work of an implementation, inputs in its dtype."""

    operator: str
    shape: str
    direction: Direction
    kind: Kind
    make: Callable[[Implementation], Work]


def by_implementation(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrises a test by case and implementation, over what runs here."""
    chosen = cases[:1] if QUICK else cases
    pairs = [(case, implementation) for case in chosen for implementation in implementations(case.kind)]
    ids = [f"{case.shape}, {case.direction}, {implementation}" for case, implementation in pairs]
    return pytest.mark.parametrize(("case", "implementation"), pairs, ids=ids)


def implementations(kind: Kind) -> list[Implementation]:
    """Those that run here, the reference first; the others go to `left_out`."""
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
    """Why it cannot run here, or None."""
    if implementation.backend == REFERENCE:
        return None
    if implementation.backend == "triton" and DEVICE.type != "cuda" and INTERPRETED:
        return "its kernels are interpreted (TRITON_INTERPRET=1), and the time of that says nothing about them"
    try:
        resolve(implementation.backend, torch.empty(1, dtype=implementation.dtype, device=DEVICE), kind=kind)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None


def call(case: Case, implementation: Implementation) -> Callable[[], object]:
    """What a round calls. As in the step, a forward in bf16 is under autocast and a backward is not."""
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
    """Seconds of one call by the wall clock, the device's work included."""
    since = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - since


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call: wall clock on the CPU; on CUDA by events and with a cold L2, the median of some 20 ms of calls."""
    if DEVICE.type != "cuda":
        return timed(run, DEVICE)
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that one call has alive at once, beyond those there before it."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # Allocations one by one: the profiler's tables add them up by operator, which hides the peak within one.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def measure(case: Case) -> dict[Implementation, Row]:
    """Every implementation of a case that runs here, in turn."""
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
    case: Case, seconds: Mapping[Implementation, list[float]], peaks: Mapping[Implementation, int | None]
) -> dict[Implementation, Row]:
    """The rows of a case, with the ratios to its references."""

    def against(dtype: torch.dtype, key: Implementation) -> Any:
        reference = Implementation(REFERENCE, dtype)
        return None if key == reference else ratio(seconds[reference], seconds[key])

    return {
        key: Row(
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
    """Of a table in the terminal."""
    median, fp32, bf16, peak = cells
    return f"  {name:18}{median:>12}{fp32:>26}{bf16:>26}{peak:>12}"


class Clock:
    """Shows what it was set to."""

    now = 0.0


def replayed_seconds() -> float:
    """The timer of pytest-benchmark."""
    return Clock.now


def replay(benchmark: BenchmarkFixture, row: Row | StepRow) -> None:
    """Gives pytest-benchmark a row and its rounds."""
    benchmark.group, benchmark.name = row.case, row.implementation
    benchmark.params = None  # of this test, which are not for JSON
    benchmark.extra_info.update(row.extra_info())
    pending = iter(row.seconds)

    def start() -> None:
        Clock.now = 0.0

    def stop() -> None:
        Clock.now = next(pending)

    benchmark.pedantic(stop, setup=start, rounds=len(row.seconds))
