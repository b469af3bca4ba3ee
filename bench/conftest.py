"""What every benchmark shares: the machine's name, and lines that pytest prints at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the reference path is the tests' oracle

LINES = pytest.StashKey[list[str]]()


def machine() -> str:
    """The GPU's name, or the CPU's with its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'CPU')}, {os.cpu_count()} cores"


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to what is printed at the end of the run."""
    return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section(f"benchmarks on {machine()}, torch {torch.__version__}")
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)
