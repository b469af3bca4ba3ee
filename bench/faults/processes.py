"""Runs of `mnclglf train` in processes of their own, small enough to be attacked many times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS, LOG_EVERY = 24, 4
OPTIONS = [
    *("--method", "byol", "--dataset", "digits", "--recipe", "quick", "--epochs", "3", "--train-images", "256"),
    *("--batch-size", "32", "--width", "4", "--projector-width", "32", "--predictor-width", "16", "--device", "cpu"),
    *("--precision", "fp32", "--log-every", str(LOG_EVERY), "--save-every", "0.25", "--loggers"),
]


def start(command: Sequence[str | Path], log: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts a Python module as `python -m`, with this tree's packages and one thread; its output goes to `log`."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )


def start_training(out: Path, *options: str, gpus: int = 2, **environment: str) -> subprocess.Popen[str]:
    """Starts the small run over ranks of this machine; its output goes beside the run directory."""
    command = ["mnclglf", "train", *OPTIONS, "--out", out, "--gpus", str(gpus), *options]
    return start(command, out.with_suffix(".log"), **environment)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Returns the process numbers of the ranks that a command has started, by rank."""
    found: dict[int, int] = {}
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in map(int, children):
            values = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(value[5:]): child for value in values if value.startswith(b"RANK=")}
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        pass
    return found


def newest_step(out: Path) -> int:
    """Returns the step of the newest checkpoint of a run; 0 without one."""
    return max((int(path.stem[5:]) for path in out.glob("checkpoints/step-*.pt")), default=0)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until a run has a checkpoint after `step` steps or more."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if newest_step(out) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {log_of(out)}")


def log_of(out: Path) -> str:
    """Returns what a run has printed."""
    return out.with_suffix(".log").read_text()


def end_of(out: Path) -> dict[str, torch.Tensor]:
    """Returns the state of the method in the newest checkpoint of a run."""
    (*_, newest) = sorted(out.glob("checkpoints/step-*.pt"))
    return torch.load(newest, weights_only=True)["method"]
