"""bench/launches.py: launches of the reference and of our step."""

import re
import subprocess
import sys

import pytest

from bench.proof import ROOT
from bench.steps import ABLATION, EAGER, REFERENCE


@pytest.mark.slow
def test_launches_are_counted():
    command = [sys.executable, "-m", "bench.launches"]  # it interprets the kernels of its process
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(r"\| (.+) \| ([\d,]+) \|", printed)}
    steps = list(ABLATION)[: list(ABLATION).index(EAGER) + 1]
    assert list(counts)[: len(steps)] == steps
    assert 300 < counts[EAGER] <= 420 < counts[REFERENCE] / 5
    beside = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", printed, re.M)
    assert len(beside) >= 9  # one row for each method
    assert all(int(whole) < 10 < int(parts) for _, parts, whole in beside)
