"""Runs the tests of the measured code before anything is measured: no speed is reported for wrong code.

A run that passed is remembered by a digest of the sources, so that only a change runs the tests again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from bench.digest import ROOT, digest

KEPT = "bench/proven"  # the key in pytest's cache
STEP_TESTS = ["tests/methods/test_mnclglf.py", "tests/training/test_step.py"]
GPU_TESTS = ["tests/kernels/test_gpu.py", "tests/training/test_compiling.py"]
OPERATOR_TESTS = ["tests/kernels/ops"]


def require_proof(config: pytest.Config, tests: Sequence[str] = (*STEP_TESTS, *OPERATOR_TESTS)) -> None:
    """Runs the tests unless these sources have passed them; ends the whole pytest run where they fail."""
    now = digest()
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if now in (cache and cache.get(KEPT, None), os.environ.get("MNCLGLF_BENCH_PROVEN")):
        return
    # A CPU run does not measure the interpreted kernels; on a GPU the tests marked gpu are the relevant ones.
    cuda = torch.cuda.is_available()
    chosen = ["-m", "gpu"] if cuda else ["-m", "not slow and not aot", "-k", "not triton"]
    tests = [*tests, *GPU_TESTS] if cuda else tests
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests, *chosen]
    environment = os.environ | {"MNCLGLF_TEST_GPU": str(int(cuda))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        shown = "\n".join((result.stdout + result.stderr).splitlines()[-25:])
        pytest.exit(f"{shown}\nthe tests fail, so no speed is reported", returncode=1)
    if cache:
        cache.set(KEPT, now)
