"""Shared by all benchmarks: the machine's name, the measurements, and the lines that pytest prints at the end."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import (
    AUTOCAST,
    DTYPES,
    BenchCase,
    Implementation,
    call,
    left_out,
    line,
    measure,
    replay,
    replayed_seconds,
)
from bench.measurement import STEP_HEADINGS, OperatorMeasurement, StepMeasurement
from bench.proof import require_proof
from bench.rounds import MATMUL, Comparison

LINES = pytest.StashKey[list[str]]()
MEASURED = pytest.StashKey[dict[BenchCase, dict[Implementation, OperatorMeasurement]]]()
MEASURED_STEPS = pytest.StashKey[dict[Comparison, dict[str, StepMeasurement]]]()


def machine() -> str:
    """Returns the GPU's name, or the CPU's name and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Returns the versions of the measured packages that are installed."""
    found = {"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}
    for name in ("torch", "triton", "faiss-cpu", "faiss-gpu", "lightly"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def proven(request: pytest.FixtureRequest) -> None:
    """Measures nothing before the tests have passed."""
    if not request.config.option.benchmark_disable:
        require_proof(request.config)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Returns a function that adds a line to the summary at the end of the run."""
    return request.config.stash.setdefault(LINES, []).append


@pytest.fixture
def side_by_side(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, say: Callable[[str], None]
) -> Callable[[BenchCase, Implementation], None]:
    """Returns a function that measures a whole case the first time, and gives pytest-benchmark one implementation."""
    measured = request.config.stash.setdefault(MEASURED, {})

    def give(case: BenchCase, implementation: Implementation) -> None:
        if not benchmark.enabled:  # --benchmark-disable: one call, no figures
            benchmark.pedantic(call(case, implementation))
            return
        if case not in measured:
            if not measured:
                say("x reference: times as fast as the plain form; median of the rounds (least to greatest)")
                say(line(""))
            measured[case] = measure(case)
            rows = list(measured[case].values())
            say(f"{rows[0].case} ({len(rows[0].seconds)} rounds)")
            for row in rows:
                say(line(row.implementation, row.cells()))
        replay(benchmark, measured[case][implementation])

    return give


@pytest.fixture
def interleaved(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, say: Callable[[str], None]
) -> Callable[[Comparison, str], None]:
    """Returns a function that measures a whole comparison the first time, and gives pytest-benchmark one step."""
    measured = request.config.stash.setdefault(MEASURED_STEPS, {})

    def give(comparison: Comparison, name: str) -> None:
        replay(benchmark, measured_step(comparison, name, measured, say))

    return give


def measured_step(
    comparison: Comparison,
    name: str,
    measured: dict[Comparison, dict[str, StepMeasurement]],
    say: Callable[[str], None],
) -> StepMeasurement:
    """Returns one step of a comparison, which is measured for the first of its steps; a failure is not repeated."""
    if comparison not in measured:
        measured[comparison] = {}
        measured[comparison], rates = comparison.measure()
        describe(comparison, measured[comparison], statistics.median(rates), say)
    if name not in measured[comparison]:
        pytest.fail("its comparison could not be measured: see the first failure")
    return measured[comparison][name]


def describe(
    comparison: Comparison, steps: dict[str, StepMeasurement], matmul_rate: float, say: Callable[[str], None]
) -> None:
    """Prints the table of a comparison."""
    first = next(iter(steps.values()))
    against = (
        "times as fast as the first" if comparison.kind == "ablation" else "ours over it, in operations per second"
    )
    say(f"{first.case} ({len(first.seconds)} rounds); ratio: {against}; median of the rounds (least to greatest)")
    say(step_line("", STEP_HEADINGS))
    for row in steps.values():
        say(step_line(row.name, row.cells()))
    say(f"  a {MATMUL} x {MATMUL} product in {DTYPES[AUTOCAST]}: {matmul_rate / 1e12:.3f} TFLOP/s")
    counted = next((row for row in reversed(steps.values()) if row.tflop and comparison.kind == "ablation"), None)
    if counted is not None and counted.tflop is not None:
        share = counted.tflop * 1e12 / statistics.median(counted.seconds) / matmul_rate
        say(f"  {counted.name}: {share:.0%} of that rate")


def step_line(name: str, cells: Sequence[str]) -> str:
    """Formats one line of the terminal's table."""
    return f"  {name:26}" + "".join(f"{cell:>{24 if i == 3 else 11}}" for i, cell in enumerate(cells))


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "min", "max", "rounds"]


def pytest_itemcollected(item: pytest.Item) -> None:
    if {"side_by_side", "interleaved"} & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.benchmark(timer=replayed_seconds))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(
        device=machine(), threads=torch.get_num_threads(), autocast=DTYPES[AUTOCAST], versions=versions()
    )


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section(f"benchmarks on {machine()}, torch {torch.__version__}")
    for name, reason in left_out.items():
        terminalreporter.write_line(f"left out: {name}: {reason}")
    for text in config.stash.get(LINES, []):
        terminalreporter.write_line(text)
