"""environment.json: the machine, the versions and the commit behind a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mnclglf.config import shown

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scikit-learn", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def describe_environment(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns versions, machine and commit of this process, and `settings` chosen for the run."""
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in PACKAGES}
    return {
        "command": " ".join([Path(sys.argv[0]).name, *map(shown, sys.argv[1:])]),
        "python": platform.python_version(),
        "packages": dict(sorted(installed.items())),
        "system": platform.platform(),
        **describe_machine(device),
        "commit": _commit(),
        **settings,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the name of the device and PyTorch's threads, on which the speed of a run depends."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"CPU, {os.cpu_count()} cores, {torch.cpu.get_capabilities().get('cpu_name', 'unknown')}",
        "torch_threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Returns the commit of the checkout that this code runs from; None for an installed package, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git on PATH, or one that cannot run; a slow network file system
        return None
    return result.stdout.strip() or None
