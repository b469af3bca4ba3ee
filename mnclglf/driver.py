"""The NVIDIA GPU of this machine, its driver, and the builds of torch for it.

Needs only the standard library: `make setup` reads it before anything is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
MINIMUM_DRIVER = {12: 525, 13: 580}

# CUDA 12 builds: cu128 ends with torch 2.11 (https://github.com/pytorch/pytorch/issues/178665), cu126 has 2.14.
CUDA12_INDEX = "https://download.pytorch.org/whl/cu126"
CUDA13_INDEX = "https://download.pytorch.org/whl/cu130"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str

    @property
    def driver_major(self) -> int:
        return int(self.driver.split(".")[0])


def parse_nvidia_smi(returncode: int, output: str) -> tuple[Gpu | None, str | None]:
    """Returns (Gpu, None) or (None, problem).

    `output` is that of `nvidia-smi --query-gpu=name,driver_version --format=csv,noheader`.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:  # a preload warning or a note of the driver may stand around the answer
        name, _, driver = (part.strip() for part in line.rpartition(","))
        # 14: the card's infoROM is damaged, which nvidia-smi notes beside a good answer.
        if returncode in (0, 14) and name and re.fullmatch(r"\d+(\.\d+)+", driver):
            return Gpu(name, driver), None
    first = lines[0] if lines else "no output"
    if returncode != 0:
        return None, f"nvidia-smi failed (exit code {returncode}): {first}"
    return None, f"nvidia-smi answered {first!r}, which names no GPU and driver"


def has_nvidia_display(pci_devices: Path) -> bool:
    """Returns whether an NVIDIA (0x10de) display controller (class 0x03) is on the PCI bus."""
    for device in pci_devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def look_for_gpu() -> tuple[Gpu | None, str | None]:
    """Returns (Gpu or None, problem or None)."""
    wsl = Path("/usr/lib/wsl/lib/nvidia-smi")  # not on PATH in every shell
    command = shutil.which("nvidia-smi") or (str(wsl) if wsl.exists() else None)
    if command is None:
        if has_nvidia_display(Path("/sys/bus/pci/devices")):
            return None, "an NVIDIA GPU is on the PCI bus, but there is no nvidia-smi: its driver is not installed"
        return None, None
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi did not answer: {error}"
    return parse_nvidia_smi(answer.returncode, answer.stdout.decode(errors="replace"))
